// CUDA's arithmetic on pairs of bfloat16.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

struct __nv_bfloat162 {
  c10::BFloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
// The sum of two such numbers in float32, rounded, is their sum rounded.
inline __nv_bfloat162 __hadd2_rn(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {static_cast<float>(a.x) + static_cast<float>(b.x),
          static_cast<float>(a.y) + static_cast<float>(b.y)};
}

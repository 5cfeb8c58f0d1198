// CUDA's arithmetic on pairs of float16.

#pragma once

#include <torch/headeronly/util/Half.h>

struct __half2 {
  c10::Half x, y;
};
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
// The sum of two such numbers in float32, rounded, is their sum rounded.
inline __half2 __hadd2_rn(__half2 a, __half2 b) {
  return {static_cast<float>(a.x) + static_cast<float>(b.x),
          static_cast<float>(a.y) + static_cast<float>(b.y)};
}

// Where a patch of an image lies on the model's square grid of position embeddings: the formula of
// transformers' vision_utils.get_vision_interpolation_indices_and_weights, operation by operation
// in float32, so that ids and weights are the same bits. One text for every compiler, Metal's
// included: no header but the integers', no library function.
//
// Each operation is rounded by itself. On CUDA that takes intrinsics; the CPU's sources are
// compiled with -ffp-contract=off, and Metal's state it in the shader.

#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

#ifdef __CUDACC__
#define INTERPOLATION_FUNCTION __host__ __device__ inline
#else
#define INTERPOLATION_FUNCTION inline
#endif

namespace embedding_lookup {

#ifdef __CUDA_ARCH__
INTERPOLATION_FUNCTION float add(float a, float b) { return __fadd_rn(a, b); }
INTERPOLATION_FUNCTION float subtract(float a, float b) { return __fsub_rn(a, b); }
INTERPOLATION_FUNCTION float multiply(float a, float b) { return __fmul_rn(a, b); }
INTERPOLATION_FUNCTION float divide(float a, float b) { return __fdiv_rn(a, b); }
#else
INTERPOLATION_FUNCTION float add(float a, float b) { return a + b; }
INTERPOLATION_FUNCTION float subtract(float a, float b) { return a - b; }
INTERPOLATION_FUNCTION float multiply(float a, float b) { return a * b; }
#if defined(__METAL_VERSION__)
// Metal's own division need not be rounded correctly.
INTERPOLATION_FUNCTION float divide(float a, float b) { return metal::precise::divide(a, b); }
#else
INTERPOLATION_FUNCTION float divide(float a, float b) { return a / b; }
#endif
#endif

// How the learned grid, `side` rows of `side` embeddings, is resampled.
struct Resampling {
  int32_t side;
  int32_t merge;       // spatial_merge_size: patches come in blocks of merge x merge
  bool align_corners;  // whether an image's corner patches lie on the grid's corners
  bool zeros;          // taps outside the grid weigh nothing; else they count as the edge
};

// One image's frames, in patches.
struct Frames {
  int64_t count;
  int64_t height;
  int64_t width;
};

INTERPOLATION_FUNCTION bool is_negative(Frames frames) {
  return frames.count < 0 || frames.height < 0 || frames.width < 0;
}

// Patches in all, or limit + 1 if there are more. Nothing overflows, for a limit of 31 bits.
INTERPOLATION_FUNCTION int64_t count_patches(Frames frames, int64_t limit) {
  if (frames.count == 0 || frames.height == 0 || frames.width == 0) return 0;
  if (frames.count > limit || frames.height > limit || frames.width > limit) return limit + 1;
  const int64_t lines = frames.count * frames.height;
  if (lines > limit || lines * frames.width > limit) return limit + 1;
  return lines * frames.width;
}

// A patch's place in its frame.
struct Patch {
  int32_t y;
  int32_t x;
};

// `index` counts the patches of a frame that is `width` of them wide, block by block, each in
// raster order. Where merge doesn't divide the height or the width, places past the frame appear,
// as they do in transformers.
INTERPOLATION_FUNCTION Patch locate(int32_t index, int32_t width, int32_t merge) {
  const int32_t block = index / (merge * merge);
  const int32_t blocks_across = width / merge;  // not zero: the launchers see to it
  return {block / blocks_across * merge + index / merge % merge,
          block % blocks_across * merge + index % merge};
}

// One axis of a patch: where on the grid it reads there, and how much each of these weighs.
template <int kTaps>
struct Taps {
  int64_t index[kTaps];
  float weight[kTaps];
};

// The weight of a tap at a distance: a triangle for two taps; for four Keys' kernel with a = -0.75.
template <int kTaps>
INTERPOLATION_FUNCTION float tap_weight(float distance) {
  if (kTaps == 2) {
    const float weight = subtract(1.0f, distance);
    return weight < 0.0f ? 0.0f : weight;
  }
  if (distance <= 1.0f) {
    const float slope = subtract(multiply(1.25f, distance), 2.25f);
    return add(multiply(multiply(slope, distance), distance), 1.0f);
  }
  const float slope = add(multiply(-0.75f, distance), 3.75f);
  const float curve = subtract(multiply(slope, distance), 6.0f);
  return add(multiply(curve, distance), 3.0f);
}

// `at` counts the patches along an axis of `size`.
template <int kTaps>
INTERPOLATION_FUNCTION Taps<kTaps> make_taps(Resampling grid, int32_t at, int32_t size) {
  const float place = static_cast<float>(at);
  float source;
  if (grid.align_corners) {
    const int32_t steps = size > 2 ? size - 1 : 1;
    source = divide(multiply(place, static_cast<float>(grid.side - 1)), static_cast<float>(steps));
  } else {
    const float centre = multiply(add(place, 0.5f), static_cast<float>(grid.side));
    source = subtract(divide(centre, static_cast<float>(size)), 0.5f);
  }
  int64_t floor = static_cast<int64_t>(source);
  if (static_cast<float>(floor) > source) --floor;
  const float fraction = subtract(source, static_cast<float>(floor));

  Taps<kTaps> taps;
  for (int i = 0; i < kTaps; ++i) {
    const int offset = kTaps == 2 ? i : i - 1;
    const int64_t index = floor + offset;
    const bool outside = index < 0 || index >= grid.side;
    const float distance = subtract(fraction, static_cast<float>(offset));
    taps.index[i] = index < 0 ? 0 : index >= grid.side ? grid.side - 1 : index;
    taps.weight[i] = tap_weight<kTaps>(distance < 0.0f ? -distance : distance);
    if (grid.zeros) taps.weight[i] = multiply(taps.weight[i], outside ? 0.0f : 1.0f);
  }
  return taps;
}

// Both axes of the patch that `index` counts within its image.
template <int kTaps>
struct PatchTaps {
  Taps<kTaps> vertical;
  Taps<kTaps> horizontal;
};

template <int kTaps>
INTERPOLATION_FUNCTION PatchTaps<kTaps> make_patch_taps(Resampling grid, Frames frames,
                                                        int32_t index) {
  const auto height = static_cast<int32_t>(frames.height);
  const auto width = static_cast<int32_t>(frames.width);
  const Patch patch = locate(index % (height * width), width, grid.merge);
  return {make_taps<kTaps>(grid, patch.y, height), make_taps<kTaps>(grid, patch.x, width)};
}

}  // namespace embedding_lookup

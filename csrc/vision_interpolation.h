// The second op's contract: which rows of a square table of position embeddings each image patch
// reads, and with what weights. ids and weights are what the lookup takes as position_ids and
// weights, with T = 4 (bilinear) or 16 (bicubic) entries:
//
//   id[p, i * n + j]     = vertical.index[i] * side + horizontal.index[j]
//   weight[p, i * n + j] = vertical.weight[i] * horizontal.weight[j],   n = 2 or 4
//
// Patches are numbered through images, frames, blocks of merge x merge and the patches of a block.
// What a tap is says interpolation_formula.h.

#pragma once

#include <cstdint>
#include <limits>

#include "embedding_lookup.h"
#include "interpolation_formula.h"

namespace embedding_lookup {

struct Interpolation {
  int64_t num_images;
  int64_t num_patches;  // of all images together; the launcher has yet to see that it is so
  Resampling resampling;
  bool bicubic;

  Operand grid_thw;  // [num_images, 3] int64 or int32: frames, height and width of each, in patches
  int64_t grid_strides[2];
  Operand ids;      // [num_patches, T] int64, contiguous, uninitialised
  Operand weights;  // [num_patches, T] float32, contiguous, uninitialised
};

C10_HOST_DEVICE inline Frames frames_of(const Interpolation& interpolation, int64_t image) {
  int64_t sizes[3];
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t offset =
        image * interpolation.grid_strides[0] + axis * interpolation.grid_strides[1];
    const Operand& grid = interpolation.grid_thw;
    sizes[axis] = grid.dtype == ScalarType::Long ? grid.data<const int64_t>()[offset]
                                                 : grid.data<const int32_t>()[offset];
  }
  return {sizes[0], sizes[1], sizes[2]};
}

// Writes the T ids and weights of the patch that `index` counts within its image.
template <int kTaps>
C10_HOST_DEVICE void interpolate_patch(const Resampling& resampling, const Frames& frames,
                                       int32_t index, int64_t* ids, float* weights) {
  const auto taps = make_patch_taps<kTaps>(resampling, frames, index);
  for (int i = 0; i < kTaps; ++i) {
    for (int j = 0; j < kTaps; ++j) {
      ids[i * kTaps + j] = taps.vertical.index[i] * resampling.side + taps.horizontal.index[j];
      weights[i * kTaps + j] = multiply(taps.vertical.weight[i], taps.horizontal.weight[j]);
    }
  }
}

// Defined once per device folder. The grids must have num_patches patches, none of their sizes may
// be negative, and none that has patches may be narrower than a block: on the CPU a ValueError, on
// CUDA a device-side assertion, on MPS an error at the next synchronisation. Called even if there
// are no patches.
void launch_interpolation(const Interpolation& interpolation, torch::stable::Device device);

inline Interpolation make_interpolation(const Tensor& grid_thw, int64_t num_grid_per_side,
                                        int64_t num_patches, bool bicubic, bool align_corners,
                                        int64_t spatial_merge_size, bool zeros) {
  check(grid_thw.scalar_type() == ScalarType::Long || grid_thw.scalar_type() == ScalarType::Int,
        "grid_thw must be int64 or int32, got ",
        torch::headeronly::toString(grid_thw.scalar_type()));
  check(grid_thw.dim() == 2 && grid_thw.size(1) == 3, "grid_thw must have shape [images, 3], got ",
        Shape{grid_thw.sizes()});
  // What 32 bits hold, and whose square they hold.
  constexpr int64_t kMaxPatches = std::numeric_limits<int32_t>::max() - 1;
  constexpr int64_t kMaxSide = std::numeric_limits<int32_t>::max();
  constexpr int64_t kMaxMerge = std::numeric_limits<int16_t>::max();
  check(num_grid_per_side >= 1 && num_grid_per_side <= kMaxSide,
        "num_grid_per_side must be from 1 to ", kMaxSide, ", got ", num_grid_per_side);
  check(spatial_merge_size >= 1 && spatial_merge_size <= kMaxMerge,
        "spatial_merge_size must be from 1 to ", kMaxMerge, ", got ", spatial_merge_size);
  check(num_patches >= 0 && num_patches <= kMaxPatches, "num_patches must be from 0 to ",
        kMaxPatches, ", got ", num_patches);
  Interpolation interpolation{};
  interpolation.num_images = grid_thw.size(0);
  interpolation.num_patches = num_patches;
  interpolation.resampling = {static_cast<int32_t>(num_grid_per_side),
                              static_cast<int32_t>(spatial_merge_size), align_corners, zeros};
  interpolation.bicubic = bicubic;
  interpolation.grid_thw = input(grid_thw);
  interpolation.grid_strides[0] = grid_thw.stride(0);
  interpolation.grid_strides[1] = grid_thw.stride(1);
  return interpolation;
}

}  // namespace embedding_lookup

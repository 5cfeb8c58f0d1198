// The second op on the CPU: each thread takes a range of the patches.

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "vision_interpolation.h"

namespace embedding_lookup {
namespace {

// Patches below which a thread is not worth waking.
constexpr int64_t kGrainPatches = 1024;

// Sees that the grids are what the other functions take them to be.
void check_grids(const Interpolation& interpolation) {
  const int64_t merge = interpolation.resampling.merge;
  int64_t total = 0;
  for (int64_t image = 0; image < interpolation.num_images; ++image) {
    const Frames frames = frames_of(interpolation, image);
    const int64_t sizes[] = {frames.count, frames.height, frames.width};
    const Shape grid{{sizes, 3}};
    check(!is_negative(frames), "grid_thw must not be negative, got ", grid, " for image ", image);
    const int64_t left = interpolation.num_patches - total;
    const int64_t patches = count_patches(frames, left);
    check(patches <= left, "num_patches must be the number of patches of all grids, which have ",
          "more than the given ", interpolation.num_patches, " up to ", grid, " of image ", image);
    check(patches == 0 || frames.width >= merge, "grid_thw must not be narrower than ",
          "spatial_merge_size, ", merge, ", got ", grid, " for image ", image);
    total += patches;
  }
  check(total == interpolation.num_patches, "num_patches must be the number of patches of all ",
        "grids, ", total, ", got ", interpolation.num_patches);
}

// Patches [begin, end).
template <int kTaps>
void interpolate(const Interpolation& interpolation, int64_t begin, int64_t end) {
  auto* ids = interpolation.ids.data<int64_t>();
  auto* weights = interpolation.weights.data<float>();
  int64_t first = 0;  // the first patch of the image
  for (int64_t image = 0; first < end; ++image) {
    const Frames frames = frames_of(interpolation, image);
    const int64_t next = first + count_patches(frames, interpolation.num_patches);
    for (int64_t patch = std::max(first, begin); patch < std::min(next, end); ++patch) {
      const int64_t entry = patch * kTaps * kTaps;
      interpolate_patch<kTaps>(interpolation.resampling, frames,
                               static_cast<int32_t>(patch - first), ids + entry, weights + entry);
    }
    first = next;
  }
}

}  // namespace

void launch_interpolation(const Interpolation& interpolation, torch::stable::Device /*device*/) {
  check_grids(interpolation);
  torch::stable::parallel_for(0, interpolation.num_patches, kGrainPatches,
                              [&](int64_t begin, int64_t end) {
                                interpolation.bicubic ? interpolate<4>(interpolation, begin, end)
                                                      : interpolate<2>(interpolation, begin, end);
                              });
}

}  // namespace embedding_lookup

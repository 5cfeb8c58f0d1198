// The second op on CUDA: ids and weights of image patches, without a look at the grids on the host.
//
// A block has kThreads patches, a thread one of them, and there is one thread more. Each walks the
// images up to the one that has its patch: all threads of a warp, and nearly all of a block, read
// the same few numbers, from the cache. The one more has no patch; it walks all images and sees
// that there are as many patches as the caller said.
//
// Memory traffic: writes 12 bytes for each of a patch's entries.

#include "common.cuh"
#include "vision_interpolation.h"

namespace embedding_lookup {
namespace {

// Not tuned.
constexpr int kThreads = 128;

template <int kTaps>
__global__ void __launch_bounds__(kThreads) interpolation_kernel(const Interpolation params) {
  const int64_t patch = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (patch > params.num_patches) return;
  int64_t first = 0;  // the first patch of the image
  for (int64_t image = 0; image < params.num_images; ++image) {
    const Frames frames = frames_of(params, image);
    CUDA_KERNEL_ASSERT(!is_negative(frames) && "grid_thw must not be negative");
    if (is_negative(frames)) return;
    const int64_t left = params.num_patches - first;
    const int64_t patches = count_patches(frames, left);
    CUDA_KERNEL_ASSERT(patches <= left && "num_patches must be the number of patches of all grids");
    if (patches > left) return;
    const bool is_too_narrow = patches > 0 && frames.width < params.resampling.merge;
    CUDA_KERNEL_ASSERT(!is_too_narrow && "grid_thw must not be narrower than spatial_merge_size");
    if (is_too_narrow) return;
    if (patch < first + patches) {
      const int64_t entry = patch * kTaps * kTaps;
      interpolate_patch<kTaps>(params.resampling, frames, static_cast<int32_t>(patch - first),
                               params.ids.data<int64_t>() + entry,
                               params.weights.data<float>() + entry);
      return;
    }
    first += patches;
  }
  CUDA_KERNEL_ASSERT(first == params.num_patches &&
                     "num_patches must be the number of patches of all grids");
}

}  // namespace

void launch_interpolation(const Interpolation& interpolation, torch::stable::Device device) {
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  launch("vision_interpolation",
         interpolation.bicubic ? interpolation_kernel<4> : interpolation_kernel<2>,
         interpolation.num_patches / kThreads + 1, kThreads, 0, current_stream(device),
         interpolation);
}

}  // namespace embedding_lookup

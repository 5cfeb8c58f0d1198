// The second op: ids and weights of image patches, see vision_interpolation.h.
//
//   vision_interpolation   a thread owns a patch, threadgroups and simdgroups nothing besides. It
//                          walks the images up to the one that has its patch. One thread more has
//                          none: it walks all images and sees that there are as many patches as the
//                          caller said.

#include "common.h"

using namespace embedding_lookup;

constant constexpr char kErrorNegative[] = ": grid_thw must not be negative";
constant constexpr char kErrorNarrow[] = ": grid_thw must not be narrower than spatial_merge_size";
constant constexpr char kErrorPatches[] =
    ": num_patches must be the number of patches of all grids";

METAL_FUNC Frames read_frames(constant Interpolation& params, device const void* grid, uint image) {
  int64_t sizes[3];
  UNROLL for (int axis = 0; axis < 3; ++axis) {
    const int64_t offset = image * params.grid_strides[0] + axis * params.grid_strides[1];
    sizes[axis] = params.grid_is_int64 != 0 ? static_cast<device const int64_t*>(grid)[offset]
                                            : static_cast<device const int32_t*>(grid)[offset];
  }
  return {sizes[0], sizes[1], sizes[2]};
}

template <int kTaps>
[[kernel]] void vision_interpolation(constant Interpolation& params [[buffer(kInterpolation)]],
                                     device const void* grid [[buffer(kGrid)]],
                                     device int64_t* ids [[buffer(kPatchIds)]],
                                     device float* weights [[buffer(kPatchWeights)]],
                                     device ErrorMessages* errors [[buffer(kErrors)]],
                                     uint group [[threadgroup_position_in_grid]],
                                     uint threads [[threads_per_threadgroup]],
                                     uint thread_index [[thread_position_in_threadgroup]]) {
  const uint patch = group * threads + thread_index;
  if (patch > params.num_patches) return;
  const bool has_patch = patch < params.num_patches;
  constant auto& given = params.resampling;
  const Resampling resampling = {given.side, given.merge, given.align_corners, given.zeros};
  int64_t first = 0;  // the first patch of the image
  for (uint image = 0; image < params.num_images; ++image) {
    const Frames frames = read_frames(params, grid, image);
    const int64_t left = params.num_patches - first;
    const int64_t patches = is_negative(frames) ? 0 : count_patches(frames, left);
    const bool is_narrow = patches > 0 && frames.width < resampling.merge;
    if (is_negative(frames) || patches > left || is_narrow) {
      constant const char* text = kErrorPatches;
      if (is_narrow) text = kErrorNarrow;
      if (is_negative(frames)) text = kErrorNegative;
      if (!has_patch) report(errors, text);  // one thread says it
      return;
    }
    if (patch < first + patches) {
      const auto taps =
          make_patch_taps<kTaps>(resampling, frames, static_cast<int32_t>(patch - first));
      const int64_t entry = int64_t(patch) * kTaps * kTaps;
      UNROLL for (int i = 0; i < kTaps; ++i) {
        UNROLL for (int j = 0; j < kTaps; ++j) {
          ids[entry + i * kTaps + j] =
              taps.vertical.index[i] * resampling.side + taps.horizontal.index[j];
          weights[entry + i * kTaps + j] =
              embedding_lookup::multiply(taps.vertical.weight[i], taps.horizontal.weight[j]);
        }
      }
      return;
    }
    first += patches;
  }
  if (!has_patch && first != params.num_patches) report(errors, kErrorPatches);
}

template [[host_name("vision_interpolation_2")]] [[kernel]]
decltype(vision_interpolation<2>) vision_interpolation<2>;
template [[host_name("vision_interpolation_4")]] [[kernel]]
decltype(vision_interpolation<4>) vision_interpolation<4>;

// The third op on Metal: Gemma 4's pixels, scaled and cast for the patch projection, see
// pixel_scaling.h.
//
//   scale_pixels   a threadgroup owns kScaledVectors groups of vectors of N elements at a time, a
//                  thread one vector of each group, a simdgroup nothing besides. The pixels are
//                  read and the result written once.

#include "common.h"

template <typename Pixel, typename Out, int N>
[[kernel]] void scale_pixels(constant Scaling& params [[buffer(kScaling)]],
                             device const Pixel* pixels [[buffer(kPixels)]],
                             device Out* out [[buffer(kScaled)]],
                             uint group [[threadgroup_position_in_grid]],
                             uint groups [[threadgroups_per_grid]],
                             uint threads [[threads_per_threadgroup]],
                             uint thread_index [[thread_position_in_threadgroup]]) {
  const int64_t step = int64_t(threads) * kScaledVectors;
  for (int64_t first = group * step; first < params.num_vectors; first += groups * step) {
    Vector<Pixel, N> values[kScaledVectors];
    UNROLL for (int v = 0; v < int(kScaledVectors); ++v) {
      // The last vector again where there are no more.
      const int64_t vector = first + int64_t(v) * threads + thread_index;
      values[v] =
          load<N>(pixels + (vector < params.num_vectors ? vector : params.num_vectors - 1) * N);
    }
    // Else a compiler moves a load to the store, which is conditional, and waits there.
    simdgroup_barrier(mem_flags::mem_none);
    UNROLL for (int v = 0; v < int(kScaledVectors); ++v) {
      const int64_t vector = first + int64_t(v) * threads + thread_index;
      Vector<Out, N> results;
      UNROLL for (int n = 0; n < N; ++n) {
        const Pixel centred = static_cast<Pixel>(values[v].get(n) - 0.5f);
        results.set(n, static_cast<float>(static_cast<Pixel>(2 * static_cast<float>(centred))));
      }
      if (vector < params.num_vectors) store(out + vector * N, results);
    }
  }
}

// What the host finds by name: scale_pixels_<pixel>_<out>_<N>.

#define INSTANTIATE_SCALING(a, b, n)                                  \
  template [[host_name("scale_pixels_" #a "_" #b "_" #n)]] [[kernel]] \
  decltype(scale_pixels<a, b, n>) scale_pixels<a, b, n>;

#define INSTANTIATE_OUTS(a, n)     \
  INSTANTIATE_SCALING(a, float, n) \
  INSTANTIATE_SCALING(a, half, n)  \
  INSTANTIATE_SCALING(a, bfloat, n)

#define INSTANTIATE_WIDTH(n) \
  INSTANTIATE_OUTS(float, n) \
  INSTANTIATE_OUTS(half, n)  \
  INSTANTIATE_OUTS(bfloat, n)

INSTANTIATE_WIDTH(1)
INSTANTIATE_WIDTH(4)

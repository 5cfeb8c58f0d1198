// The third op on CUDA: Gemma 4's pixels, scaled and cast for the patch projection.
//
// A block has kThreads * kUnroll neighbouring vectors of N elements: kUnroll groups of kThreads, of
// each of which a warp has 32 neighbours and a thread one. All of a thread's loads go out before
// the first is waited for.
//
// Memory traffic: reads the pixels and writes the result once, past the caches.

#include "common.cuh"
#include "pixel_scaling.h"

namespace embedding_lookup {
namespace {

// Not tuned: with float32 pixels 64 bytes a thread are in flight.
constexpr int kThreads = 256;
constexpr int kUnroll = 4;

template <typename Pixel, typename Out, int N>
__device__ __forceinline__ Vector<Out, N> scale(const Vector<Pixel, N>& vector) {
  Pixel pixels[N];
  vector.unpack(pixels);
  Out results[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const auto centred = static_cast<Pixel>(static_cast<float>(pixels[n]) - 0.5f);
    results[n] = static_cast<Out>(static_cast<Pixel>(__fmul_rn(2.0f, static_cast<float>(centred))));
  }
  Vector<Out, N> result;
  result.pack(results);
  return result;
}

template <typename Pixel, typename Out, int N>
__global__ void __launch_bounds__(kThreads) scaling_kernel(const Scaling scaling) {
  const auto* pixels = scaling.pixels.data<const Pixel>();
  auto* out = scaling.out.data<Out>();
  const int64_t first = int64_t{blockIdx.x} * kThreads * kUnroll + threadIdx.x;
  Vector<Pixel, N> vectors[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    // The last vector again where there are no more: a branch would be waited in.
    const int64_t i = min((first + u * kThreads) * N, scaling.count - N);
    vectors[u] = load<N, Cache::kStream>(pixels + i);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = (first + u * kThreads) * N;
    if (i < scaling.count) store_streaming<N>(out + i, scale<Pixel, Out, N>(vectors[u]));
  }
}

template <typename Pixel, typename Out>
void launch_scaling(const Scaling& scaling, cudaStream_t stream) {
  constexpr int N = kVectorBytes / std::max(sizeof(Pixel), sizeof(Out));
  const bool vectorise = scaling.count % N == 0 &&
                         can_vectorise(scaling.pixels.data<const char>(), sizeof(Pixel), N, {}) &&
                         can_vectorise(scaling.out.data<const char>(), sizeof(Out), N, {});
  const int64_t vectors = vectorise ? scaling.count / N : scaling.count;
  launch("scale_pixels", vectorise ? scaling_kernel<Pixel, Out, N> : scaling_kernel<Pixel, Out, 1>,
         (vectors + kThreads * kUnroll - 1) / (kThreads * kUnroll), kThreads, 0, stream, scaling);
}

}  // namespace

void launch_scaling(const Scaling& scaling, torch::stable::Device device) {
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  dispatch(scaling.pixels.dtype, [&](auto pixel) {
    dispatch(scaling.out.dtype, [&](auto out) {
      launch_scaling<typename decltype(pixel)::type, typename decltype(out)::type>(
          scaling, current_stream(device));
    });
  });
}

}  // namespace embedding_lookup

// CUDA's face of the engine: what csrc/cuda/ uses of the CUDA runtime, for a host compiler.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../simt.h"

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};

// threadIdx and its like: one dimension, asked of the engine when read.
template <unsigned (*kRead)()>
struct BuiltinIndex {
  struct {
    operator unsigned() const { return kRead(); }
  } x;
};
inline constexpr BuiltinIndex<simt::thread_index> threadIdx{};
inline constexpr BuiltinIndex<simt::block_index> blockIdx{};
inline constexpr BuiltinIndex<simt::num_blocks> gridDim{};

inline void __syncthreads() { simt::sync_block(); }
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return simt::ballot(mask, predicate);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return static_cast<T>(simt::shuffle(mask, static_cast<uint64_t>(value), source));
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return simt::atomic(address, [=](unsigned old) { return old + value; });
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  return simt::atomic(address, [=](unsigned) { return value; });
}

// Cache hints change nothing here.
template <typename T>
T __ldg(const T* address) {
  simt::check_aligned(address, sizeof(T));
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return __ldg(address);
}
template <typename T>
void __stcs(T* address, T value) {
  simt::check_aligned(address, sizeof(T));
  *address = value;
}

using std::min;

// Host.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

// The shared memory of the one block that runs, and how much of it a kernel may ask for: 48 KiB,
// more only after it was raised, and nowhere more than the least of the architectures has.
extern uint4 dynamic_shared_memory[];
constexpr size_t kDefaultSharedBytes = 48 << 10;
constexpr size_t kMaxSharedBytes = 64 << 10;
size_t& cuda_max_shared_bytes(const void* kernel);

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > kMaxSharedBytes) return cudaErrorInvalidValue;
  cuda_max_shared_bytes(reinterpret_cast<const void*>(kernel)) = bytes;
  return cudaSuccess;
}

// A kernel and its argument, from which each thread takes its own copy. Not instrumented: they are
// on the host's stack.
template <typename Params>
struct CudaCall {
  void (*kernel)(Params);
  const Params& params;
  __attribute__((no_sanitize("thread"))) static void run(const void* call) {
    static_cast<const CudaCall*>(call)->kernel(static_cast<const CudaCall*>(call)->params);
  }
};

template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  if (config->dynamicSmemBytes > cuda_max_shared_bytes(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  const CudaCall<Params> call{kernel, params};
  simt::launch(config->gridDim.x, config->blockDim.x, dynamic_shared_memory,
               config->dynamicSmemBytes, CudaCall<Params>::run, &call);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);

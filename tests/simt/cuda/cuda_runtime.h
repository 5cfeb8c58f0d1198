// CUDA's face of the engine: what csrc/cuda/ uses of the CUDA runtime, for a host compiler.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

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
inline void __syncwarp() { simt::sync_warp(); }
inline unsigned __match_any_sync(unsigned mask, unsigned value) { return simt::match(mask, value); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = simt::shuffle(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = simt::thread_index() % simt::kWarpSize;
  return __shfl_sync(mask, value, lane < delta ? lane : lane - delta);
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return simt::atomic(address, [=](unsigned old) { return old + value; });
}
inline void cudaGridDependencySynchronize() { simt::wait_for_previous_launch(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}

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
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorStreamCaptureUnsupported };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorStreamCaptureUnsupported
             ? "operation not permitted when stream is capturing"
             : "invalid argument";
}
extern bool refuses_launches;
extern thread_local cudaError_t last_error;
inline cudaError_t cudaPeekAtLastError() { return last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

// As strict as the runtime is while a graph is captured, always: a kernel may be loaded only in the
// relaxed mode.
extern thread_local cudaStreamCaptureMode capture_mode;
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}
inline cudaError_t loading_error() {
  return capture_mode == cudaStreamCaptureModeRelaxed ? cudaSuccess
                                                      : cudaErrorStreamCaptureUnsupported;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Params)) {
  attributes->ptxVersion = 90;
  const cudaError_t error = loading_error();
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The shared memory of the one block that runs, and how much of it a kernel may ask for without a
// word.
extern uint4 dynamic_shared_memory[];
constexpr size_t kMaxSharedBytes = 48 << 10;

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
  cudaError_t error = loading_error();
  if (config->dynamicSmemBytes > kMaxSharedBytes || refuses_launches) {
    error = cudaErrorInvalidValue;
  }
  if (error != cudaSuccess) return last_error = error;
  const CudaCall<Params> call{kernel, params};
  simt::launch(config->gridDim.x, config->blockDim.x, dynamic_shared_memory,
               config->dynamicSmemBytes, CudaCall<Params>::run, &call, config->numAttrs > 0);
  return cudaSuccess;
}

// What the forward and the backward share on CUDA: vector accesses with cache hints, the way from a
// token to its elements, the choice of a kernel by dtype, and the launch.
//
// Standard CUDA C++ without <<<>>>, inline assembly or static __shared__ arrays: tests/simt/
// compiles these files unchanged with a host compiler and runs them where there is no GPU.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <type_traits>

#include "embedding_lookup.h"

// Declared by torch only where its own headers are built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace embedding_lookup {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// The widest access of one thread.
constexpr int kVectorBytes = 16;

// ---------------------------------------------------------------------------------------------
// Vectors.

// N neighbouring elements, read and written in words of up to 16 bytes: their address must be a
// multiple of the vector's size, or of 16 bytes if that is less.
template <typename T, int N>
struct Vector {
  static constexpr int kBytes = sizeof(T) * N;
  using Word = std::conditional_t<
      kBytes % 16 == 0, uint4,
      std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  static constexpr int kWords = kBytes / sizeof(Word);
  Word words[kWords];

  __device__ __forceinline__ void unpack(T (&elements)[N]) const {
    std::memcpy(elements, words, kBytes);
  }
  __device__ __forceinline__ void pack(const T (&elements)[N]) {
    std::memcpy(words, elements, kBytes);
  }
};

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> filled(float value) {
  T elements[N];
#pragma unroll
  for (int n = 0; n < N; ++n) elements[n] = static_cast<T>(value);
  Vector<T, N> vector;
  vector.pack(elements);
  return vector;
}

template <typename T, int N>
__device__ __forceinline__ void to_floats(const Vector<T, N>& vector, float (&floats)[N]) {
  if constexpr (std::is_same_v<T, BFloat16> && N % 2 == 0) {
    // The upper halves of float32s: one instruction each, where a conversion may take two.
    uint32_t words[N / 2];
    std::memcpy(words, vector.words, sizeof(words));
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint32_t bits = n % 2 == 0 ? words[n / 2] << 16 : words[n / 2] & 0xffff0000;
      std::memcpy(&floats[n], &bits, sizeof(bits));
    }
  } else {
    T elements[N];
    vector.unpack(elements);
#pragma unroll
    for (int n = 0; n < N; ++n) floats[n] = static_cast<float>(elements[n]);
  }
}

enum class Cache {
  kKeep,   // read again soon
  kStream  // read once: first to be evicted
};

// Of what nobody writes during the kernel, nor during one that may still run when it starts.
template <int N, Cache kCache, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* address) {
  const auto* words = reinterpret_cast<const typename Vector<T, N>::Word*>(address);
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kWords; ++i) {
    vector.words[i] = kCache == Cache::kKeep ? __ldg(words + i) : __ldcs(words + i);
  }
  return vector;
}

// Not read again soon.
template <int N, typename T>
__device__ __forceinline__ void store_streaming(T* address, const Vector<T, N>& vector) {
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kWords; ++i) {
    __stcs(reinterpret_cast<typename Vector<T, N>::Word*>(address) + i, vector.words[i]);
  }
}

// Sums in float32, moved as vectors of up to four.
template <int N>
__device__ __forceinline__ void load_sums(const float* address, float (&sums)[N]) {
  constexpr int kWidth = N % 4 == 0 ? 4 : 1;
  using Word = typename Vector<float, kWidth>::Word;
#pragma unroll
  for (int n = 0; n < N; n += kWidth) {
    const Word word = *reinterpret_cast<const Word*>(address + n);
    std::memcpy(sums + n, &word, sizeof(word));
  }
}
template <int N>
__device__ __forceinline__ void store_sums(float* address, const float (&sums)[N]) {
  constexpr int kWidth = N % 4 == 0 ? 4 : 1;
  using Word = typename Vector<float, kWidth>::Word;
#pragma unroll
  for (int n = 0; n < N; n += kWidth) {
    Word word;
    std::memcpy(&word, sums + n, sizeof(word));
    *reinterpret_cast<Word*>(address + n) = word;
  }
}

// Whether vectors of N elements may be accessed at `address` plus any multiple of the strides,
// which count elements.
inline bool can_vectorise(const void* address, int64_t element_size, int n,
                          std::initializer_list<int64_t> strides) {
  const int64_t bytes = std::min<int64_t>(n * element_size, kVectorBytes);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) return false;
  return std::all_of(strides.begin(), strides.end(),
                     [&](int64_t stride) { return stride * element_size % bytes == 0; });
}

// The same of an activation's columns, for all tokens.
inline bool can_vectorise_activation(const Lookup& lookup, int64_t element_size, int n) {
  const TokenOperand& activation = lookup.activation;
  const auto* data = activation.data<const char>();
  bool result = activation.last_stride == 1 && can_vectorise(data, element_size, n, {});
  for (int dim = 0; dim < lookup.num_token_dims; ++dim) {
    result = result && can_vectorise(data, element_size, n, {activation.token_strides[dim]});
  }
  return result;
}

// ---------------------------------------------------------------------------------------------
// Tokens.

// An entry's id as it was read, which doesn't wait for it.
struct RawId {
  uint32_t low = 0, high = 0;
};

__device__ __forceinline__ RawId load_id(const Lookup& lookup, const TokenOffsets& offsets, int k) {
  const int64_t offset = offsets.ids + k * lookup.ids.last_stride;
  const bool is_wide = lookup.ids.dtype == ScalarType::Long;
  const auto* halves = lookup.ids.data<const uint32_t>() + (is_wide ? 2 * offset : offset);
  RawId id;
  id.low = __ldg(halves);
  if (is_wide) id.high = __ldg(halves + 1);
  return id;
}

// Its token's padding, likewise: a bool would be waited for at once.
__device__ __forceinline__ uint8_t load_padding(const Lookup& lookup, const TokenOffsets& offsets) {
  return lookup.padding.present() ? __ldg(lookup.padding.data<const uint8_t>() + offsets.padding)
                                  : uint8_t{0};
}

constexpr int64_t kNoRow = -1;

// The row of its table that an entry reads, or kNoRow: here alone padding, padding_id and ids below
// zero are resolved. Too large an id is an assertion, as in F.embedding, and never an address.
__device__ __forceinline__ int64_t resolve_row(const Lookup& lookup, RawId raw, uint8_t padding) {
  const int64_t id = lookup.ids.dtype == ScalarType::Long
                         ? static_cast<int64_t>(uint64_t{raw.high} << 32 | raw.low)
                         : static_cast<int32_t>(raw.low);
  if (lookup.has_padding_id && id == lookup.padding_id) return kNoRow;
  CUDA_KERNEL_ASSERT(id < lookup.num_rows && "position_ids must be less than the table's rows");
  if (padding != 0) return kNoRow;
  return id < 0 ? 0 : id;
}

// ---------------------------------------------------------------------------------------------
// Launches.

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<T>{}) with the T of a dtype that check_floating lets through.
template <typename Function>
void dispatch(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(Type<float>{});
    case ScalarType::Half:
      return function(Type<Half>{});
    case ScalarType::BFloat16:
      return function(Type<BFloat16>{});
    default:
      check(false, "no CUDA kernel for ", torch::headeronly::toString(dtype));
  }
}

// Reported here, so that whoever asks for the last error next isn't told of it.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("fused_embedding_lookup failed: ") + what + ": " +
                           cudaGetErrorString(error));
}

// Tokens and columns are counted in 32 bits: dividing 64-bit numbers takes a GPU a hundred
// instructions. Offsets have 64.
inline void check_counts(const Lookup& lookup) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  check(lookup.num_tokens <= kMax, "position_ids must have at most ", kMax, " tokens on CUDA, got ",
        lookup.num_tokens);
  check(lookup.num_columns <= kMax / 2, "table must have at most ", kMax / 2,
        " columns on CUDA, got ", lookup.num_columns);
}

// The stream on which PyTorch's own kernels for the current device run.
inline cudaStream_t current_stream(torch::stable::Device device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A kernel is loaded when it is first launched. Should that be while a graph is captured, the
// loading is nothing that the graph has to hold, and the capture must not refuse it.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Whether kernels, of which this is any, may be launched while the one before still runs: they wait
// for that one only in the code for 9.0 and later, which need not be the code that a build has for
// such a device. Asked once a device and thread.
template <typename Params>
bool can_overlap(void (*kernel)(Params), torch::stable::Device device) {
  static thread_local std::map<int32_t, bool> answers;
  const auto known = answers.find(device.index());
  if (known != answers.end()) return known->second;
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "asking what a kernel was compiled for");
  return answers[device.index()] = attributes.ptxVersion >= 90;
}

// How a kernel follows the one before it on the stream.
enum class Follow {
  kWhenDone,
  kOverlapping  // starts early, and calls wait_for_previous_kernel
};

// The first thing in every thread of a kernel that may overlap: from here on, what the kernels
// before wrote can be read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The next kernel may be started now, if it may overlap. It must be one of ours, which waits.
__device__ __forceinline__ void let_next_kernel_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes,
            cudaStream_t stream, const Params& params, Follow follow = Follow::kWhenDone) {
  check(blocks <= std::numeric_limits<int32_t>::max(),
        "the arguments are too large for CUDA: ", name, " would take ", blocks, " blocks");
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = follow == Follow::kOverlapping ? 1 : 0;
  const RelaxedCapture relaxed;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace embedding_lookup

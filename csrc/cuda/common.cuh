// What the forward and the backward share on CUDA: vector accesses with cache hints, the way from a
// token to its elements, the choice of a kernel by dtype, and the launch.
//
// Standard CUDA C++ without <<<>>>, inline assembly or static __shared__ arrays: tests/simt/
// compiles these files unchanged with a host compiler and runs them where there is no GPU.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>
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

// N neighbouring elements, accessed in words of up to 16 bytes: their address must be a multiple of
// the vector's size, or of 16 bytes if that is less. The elements stay packed until they are asked
// for: unpacked ones take twice the registers in 16 bits.
template <typename T, int N>
class Vector {
  static constexpr int kBytes = sizeof(T) * N;
  using Part = std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>;
  static constexpr int kPerPart = sizeof(Part) / sizeof(T);
  Part parts_[kBytes / sizeof(Part)] = {};

 public:
  using Word = std::conditional_t<
      kBytes % 16 == 0, uint4,
      std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  static constexpr int kWords = kBytes / sizeof(Word);

  __device__ __forceinline__ Word word(int i) const {
    Word word;
    std::memcpy(&word, parts_ + i * (sizeof(Word) / sizeof(Part)), sizeof(word));
    return word;
  }
  __device__ __forceinline__ void set_word(int i, Word word) {
    std::memcpy(parts_ + i * (sizeof(Word) / sizeof(Part)), &word, sizeof(word));
  }

  __device__ __forceinline__ float get(int i) const {
    const auto bits = static_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>(
        parts_[i / kPerPart] >> (i % kPerPart * 16));
    T value;
    std::memcpy(&value, &bits, sizeof(value));
    return static_cast<float>(value);
  }
  // Once per element, of a vector of zeros. Rounds.
  __device__ __forceinline__ void set(int i, float value) {
    const T rounded = static_cast<T>(value);
    std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    parts_[i / kPerPart] |= static_cast<Part>(bits) << (i % kPerPart * 16);
  }
};

enum class Cache {
  kKeep,   // read again soon, and written by nobody during the kernel
  kStream  // read once: first to be evicted
};

template <int N, Cache kCache, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* address) {
  const auto* words = reinterpret_cast<const typename Vector<T, N>::Word*>(address);
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kWords; ++i) {
    vector.set_word(i, kCache == Cache::kKeep ? __ldg(words + i) : __ldcs(words + i));
  }
  return vector;
}

// To shared memory, or to be read soon by the next kernel.
template <int N, typename T>
__device__ __forceinline__ void store(T* address, const Vector<T, N>& vector) {
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kWords; ++i) {
    reinterpret_cast<typename Vector<T, N>::Word*>(address)[i] = vector.word(i);
  }
}

// Not read again by these kernels.
template <int N, typename T>
__device__ __forceinline__ void store_streaming(T* address, const Vector<T, N>& vector) {
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kWords; ++i) {
    __stcs(reinterpret_cast<typename Vector<T, N>::Word*>(address) + i, vector.word(i));
  }
}

// Whether every row of N-element vectors that starts at `data` plus a multiple of the strides may
// be accessed as vectors.
inline bool can_vectorise(const void* data, int64_t element_size, int n,
                          std::initializer_list<int64_t> strides) {
  const int64_t bytes = std::min<int64_t>(n * element_size, kVectorBytes);
  if (reinterpret_cast<uintptr_t>(data) % bytes != 0) return false;
  return std::all_of(strides.begin(), strides.end(),
                     [&](int64_t stride) { return stride * element_size % bytes == 0; });
}

inline bool can_vectorise_rows(const Lookup& lookup, const void* data, int64_t element_size, int n,
                               int64_t hidden_stride) {
  bool result =
      lookup.hidden % n == 0 && hidden_stride == 1 && can_vectorise(data, element_size, n, {});
  for (int dim = 0; dim < lookup.num_token_dims; ++dim) {
    result = result && can_vectorise(data, element_size, n, {lookup.rows_strides[dim]});
  }
  return result;
}

// ---------------------------------------------------------------------------------------------
// Tokens.

// Where a token's entries begin in each tensor, in elements.
struct TokenOffsets {
  int64_t ids = 0;
  int64_t padding = 0;
  int64_t rows = 0;
};

// Without a division where the leading dimensions merged into one, as those of contiguous tensors
// do.
__device__ __forceinline__ TokenOffsets token_offsets(const Lookup& lookup, uint32_t token) {
  TokenOffsets offsets;
#pragma unroll 1
  for (int dim = lookup.num_token_dims - 1; dim > 0; --dim) {
    const auto size = static_cast<uint32_t>(lookup.token_sizes[dim]);
    const uint32_t index = token % size;
    token /= size;
    offsets.ids += index * lookup.ids_strides[dim];
    offsets.padding += index * lookup.padding_strides[dim];
    offsets.rows += index * lookup.rows_strides[dim];
  }
  offsets.ids += token * lookup.ids_strides[0];
  offsets.padding += token * lookup.padding_strides[0];
  offsets.rows += token * lookup.rows_strides[0];
  return offsets;
}

__device__ __forceinline__ bool is_padding(const Lookup& lookup, const TokenOffsets& offsets) {
  return lookup.padding != nullptr && lookup.padding[offsets.padding];
}

constexpr int64_t kNoRow = -1;

// The table row that a token reads on an axis, or kNoRow. Too large an id is an assertion, as in
// F.embedding, and never an address.
__device__ __forceinline__ int64_t load_row(const Lookup& lookup, const TokenOffsets& offsets,
                                            int64_t axis) {
  const int64_t offset = offsets.ids + axis * lookup.ids_axis_stride;
  const int64_t id = lookup.ids_are_int64 ? __ldg(static_cast<const int64_t*>(lookup.ids) + offset)
                                          : __ldg(static_cast<const int32_t*>(lookup.ids) + offset);
  if (lookup.has_padding_id && id == lookup.padding_id) return kNoRow;
  CUDA_KERNEL_ASSERT(id < lookup.num_rows && "position_ids must be less than the table's rows");
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

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fused_embedding_lookup: ") + what + ": " +
                           cudaGetErrorString(error));
}

// Tokens are counted in 32 bits: dividing 64-bit numbers takes a GPU a hundred instructions.
inline void check_num_tokens(const Lookup& lookup) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  check(lookup.num_tokens <= kMax, "position_ids must have at most ", kMax, " tokens on CUDA, got ",
        lookup.num_tokens);
}

// The stream on which PyTorch's own kernels for the current device run.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes,
            cudaStream_t stream, const Params& params) {
  check(blocks <= std::numeric_limits<int32_t>::max(),
        "the arguments are too large for CUDA: ", name, " would take ", blocks, " blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace embedding_lookup

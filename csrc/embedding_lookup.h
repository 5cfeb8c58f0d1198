// The contract that every device implements: what a launcher is given, and the checks that make it
// safe to launch. A device folder includes this header and nothing of its siblings.
//
// Each token (one index into the leading dimensions "[...]") has K entries, each a row of the table
// and a weight (1 if there are no weights). Forward, for a token t and a column h:
//
//   term_k    = float32(table[row_k, h]), times weights[t, k] and rounded to float32
//   e[t, h]   = round_to_embedding_dtype( term_0 + term_1 + ... )
//   out[t, h] = residual[t, h] + (padding[t] ? 0 : e[t, h])
//
// in order, each addition in float32 (float64 for a float64 table), none fused with the product.
// With weights the sum starts from +0. The last addition happens in the dtype of `out`,
// promote_types(embedding_dtype, residual), or in float32 where that is a 16-bit type. These are
// the roundings of the code it replaces (transformers, Gemma4VisionPatchEmbedder and the position
// embedding of the Qwen3-VL family), so the results are the same bits.
//
// Backward, the adjoint of e with respect to the table:
//
//   grad_table[r, h] = sum of weights[t, k] * grad[t, h] over the entries (t, k) whose row is r
//
// accumulated in float32 or better, in an order that depends on nothing but the ids, the padding
// and the shapes, and rounded once.
//
// Which row an entry reads: with id = position_ids[t, k],
//   - none, if id equals padding_id or the token is padding: it adds zero, and no row gets its
//   gradient;
//   - else row max(id, 0) of the one table that all axes share, or of the table of axis k. Rows are
//     numbered through all tables: k * P + max(id, 0).
// An id >= P must never be used as an address. On the CPU it is an IndexError, on CUDA a
// device-side assertion, on MPS an error at the next synchronisation.

#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace embedding_lookup {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Entries of a token: K.
constexpr int kMaxEntries = 64;

// Leading dimensions left after merging, see merge_token_dims. Contiguous tensors of any rank need
// one, a batch that is expanded or sliced two.
constexpr int kMaxTokenDims = 8;

// Where a tensor's elements begin.
struct Operand {
  // The start of the tensor's storage; on MPS not an address but the MTLBuffer. Null: the argument
  // is absent (or has no elements, so that nothing reads it).
  void* storage;
  int64_t byte_offset;  // from there to the first element
  ScalarType dtype;

  C10_HOST_DEVICE bool present() const { return storage != nullptr; }

  // Not on MPS. `T` is const for what is only read.
  template <typename T>
  C10_HOST_DEVICE T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(storage) + byte_offset);
  }
};

// A tensor that has something for every token. Strides count elements.
struct TokenOperand : Operand {
  int64_t token_strides[kMaxTokenDims];  // of the token dimensions, outermost first
  int64_t last_stride;                   // from entry to entry, or from column to column
};

// The table, or its gradient. Strides count elements; that of the columns is 1.
struct TableOperand : Operand {
  int64_t entry_stride;  // from axis k's table to the next axis's; 0 if all share one
  int64_t row_stride;
};

// One lookup, forward or backward: all that a launcher and its kernels are given.
struct Lookup {
  int64_t num_tokens;
  int num_token_dims;  // the leading dimensions "[...]", merged; outermost first
  int64_t token_sizes[kMaxTokenDims];

  int64_t num_entries;     // K
  int64_t num_rows;        // P: what an id must be less than
  int64_t rows_per_entry;  // P, or 0 for a shared table: entry k's row is k * rows_per_entry + id
  int64_t num_columns;     // H

  bool has_padding_id;
  int64_t padding_id;

  TokenOperand ids;      // [..., K] int64 or int32
  TokenOperand weights;  // [..., K] float32; may be absent
  TokenOperand padding;  // [...] bool; may be absent
  // [..., H] The residual, which may be absent; backward: the gradient of `out`.
  TokenOperand activation;

  TableOperand table;          // forward: read. Backward: its gradient, contiguous, uninitialised
  Operand out;                 // forward: [..., H], contiguous, uninitialised. Backward: absent
  ScalarType embedding_dtype;  // forward: what the sum is rounded to before the residual is added

  // Of the table and its gradient, all axes' together.
  int64_t total_rows() const { return rows_per_entry == 0 ? num_rows : num_entries * num_rows; }
};

// ---------------------------------------------------------------------------------------------
// From a token to its entries, for kernels in C++.

// A token's number. CUDA takes 2^31 - 1 of them: dividing 64-bit numbers takes a GPU a hundred
// instructions.
#if defined(CUDA_KERNEL)
using TokenIndex = uint32_t;
#else
using TokenIndex = int64_t;
#endif

// Where a token begins in each operand, in elements; 0 in one that is absent.
struct TokenOffsets {
  int64_t ids = 0;
  int64_t weights = 0;
  int64_t padding = 0;
  int64_t activation = 0;
};

// Without a division where the leading dimensions merged into one, as those of contiguous tensors
// do.
C10_HOST_DEVICE inline TokenOffsets token_offsets(const Lookup& lookup, TokenIndex token) {
  TokenOffsets offsets;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int dim = lookup.num_token_dims - 1; dim >= 0; --dim) {
    int64_t index = token;
    if (dim > 0) {
      const auto size = static_cast<TokenIndex>(lookup.token_sizes[dim]);
      index = token % size;
      token /= size;
    }
    offsets.ids += index * lookup.ids.token_strides[dim];
    offsets.weights += index * lookup.weights.token_strides[dim];
    offsets.padding += index * lookup.padding.token_strides[dim];
    offsets.activation += index * lookup.activation.token_strides[dim];
  }
  return offsets;
}

C10_HOST_DEVICE inline bool is_padding(const Lookup& lookup, const TokenOffsets& offsets) {
  return lookup.padding.present() && lookup.padding.data<const bool>()[offsets.padding];
}

C10_HOST_DEVICE inline int64_t read_id(const Lookup& lookup, const TokenOffsets& offsets,
                                       int64_t k) {
  const int64_t offset = offsets.ids + k * lookup.ids.last_stride;
  return lookup.ids.dtype == ScalarType::Long ? lookup.ids.data<const int64_t>()[offset]
                                              : lookup.ids.data<const int32_t>()[offset];
}

C10_HOST_DEVICE inline float read_weight(const Lookup& lookup, const TokenOffsets& offsets,
                                         int64_t k) {
  return lookup.weights.present()
             ? lookup.weights.data<const float>()[offsets.weights + k * lookup.weights.last_stride]
             : 1;
}

// ---------------------------------------------------------------------------------------------
// What a device folder defines.

// Defined once per device folder; an extension contains one device. `out`, or the gradient, has
// elements. There may be no tokens only in the backward.
void launch_forward(const Lookup& lookup, torch::stable::Device device);
void launch_backward(const Lookup& lookup, torch::stable::Device device);

// The instruction set in use, as ATEN_CPU_CAPABILITY names it. The CPU's folder only.
std::string cpu_capability();

// What went wrong on the device before now and was not reported yet; empty if nothing did. CUDA's
// folder only.
std::string pending_device_error();

// ---------------------------------------------------------------------------------------------
// Checks. Each error names the argument, what it got and what it takes.

// std::invalid_argument becomes a ValueError in Python; since torch 2.15 by way of a RuntimeError,
// which autograd.py knows by this beginning. What isn't the arguments' fault begins otherwise.
template <typename... Args>
inline void check(bool condition, const Args&... message) {
  if (condition) return;
  std::ostringstream stream;
  stream << "fused_embedding_lookup: ";
  (stream << ... << message);
  throw std::invalid_argument(stream.str());
}

// A shape in a message: written only if there is one.
struct Shape {
  IntHeaderOnlyArrayRef sizes;
};
inline std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  stream << "[";
  for (size_t i = 0; i < shape.sizes.size(); ++i) stream << (i == 0 ? "" : ", ") << shape.sizes[i];
  return stream << "]";
}

// Only the CPU's kernels take float64.
#if defined(CPU_KERNEL)
constexpr bool kTakesDouble = true;
#else
constexpr bool kTakesDouble = false;
#endif

// The floating dtypes a kernel reads and writes.
inline void check_floating(const char* name, ScalarType dtype) {
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
            (kTakesDouble && dtype == ScalarType::Double),
        name, " must be float32, float16", kTakesDouble ? ", bfloat16 or float64" : " or bfloat16",
        ", got ", torch::headeronly::toString(dtype));
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& ids) {
  check(tensor.device() == ids.device(), name, " must be on the device of position_ids, ",
        "got device type ", static_cast<int>(tensor.device().type()), " index ",
        tensor.get_device_index(), " and device type ", static_cast<int>(ids.device().type()),
        " index ", ids.get_device_index());
}

// `tensor` must have the leading dimensions of position_ids, followed by `last` if that is given.
inline void check_token_shape(const char* name, const Tensor& tensor, const Tensor& ids,
                              std::optional<int64_t> last) {
  const int64_t leading = ids.dim() - 1;
  bool matches = tensor.dim() == leading + (last ? 1 : 0);
  for (int64_t i = 0; matches && i < leading; ++i) matches = tensor.size(i) == ids.size(i);
  if (matches && last) matches = tensor.size(leading) == *last;
  if (matches) return;
  std::ostringstream expected;
  for (int64_t i = 0; i < leading; ++i) expected << (i == 0 ? "" : ", ") << ids.size(i);
  if (last) expected << (leading == 0 ? "" : ", ") << *last;
  check(false, name, " must have shape [", expected.str(), "] to go with position_ids of shape ",
        Shape{ids.sizes()}, ", got ", Shape{tensor.sizes()});
}

// ---------------------------------------------------------------------------------------------
// From tensors to a Lookup.

inline Operand operand(const Tensor& tensor, void* data) {
  if (tensor.numel() == 0) return {nullptr, 0, tensor.scalar_type()};
  const auto byte_offset = static_cast<int64_t>(tensor.storage_offset() * tensor.element_size());
  return {static_cast<char*>(data) - byte_offset, byte_offset, tensor.scalar_type()};
}
inline Operand input(const Tensor& tensor) {
  return operand(tensor, const_cast<void*>(tensor.const_data_ptr()));
}
inline Operand output(const Tensor& tensor) { return operand(tensor, tensor.mutable_data_ptr()); }

// Appends the leading dimensions of the ids, dropping those of size 1 and merging neighbours that
// are one dimension in every tensor, so that the kernels walk as few as the strides allow.
inline void merge_token_dims(Lookup& lookup, const Tensor& ids,
                             const std::vector<std::pair<const Tensor*, TokenOperand*>>& operands) {
  lookup.num_tokens = 1;
  lookup.num_token_dims = 0;
  for (int64_t dim = 0; dim < ids.dim() - 1; ++dim) {
    const int64_t size = ids.size(dim);
    lookup.num_tokens *= size;
    if (size == 1) continue;
    const int last = lookup.num_token_dims - 1;
    bool merges = last >= 0;
    for (const auto& [tensor, operand] : operands) {
      merges = merges && operand->token_strides[last] == tensor->stride(dim) * size;
    }
    if (!merges) {
      check(lookup.num_token_dims < kMaxTokenDims, "position_ids of shape ", Shape{ids.sizes()},
            " has more than ", kMaxTokenDims, " leading dimensions whose strides cannot be merged");
      lookup.token_sizes[lookup.num_token_dims++] = 1;
    }
    const int merged = lookup.num_token_dims - 1;
    lookup.token_sizes[merged] *= size;
    for (const auto& [tensor, operand] : operands)
      operand->token_strides[merged] = tensor->stride(dim);
  }
  if (lookup.num_tokens == 0) lookup.num_token_dims = 0;  // there is no index to decompose
}

// Checks what both directions take and fills what they share. `activation` is the residual or the
// gradient, `name` says which. A shared table has no axis of its own: its shape is [num_rows, H].
inline Lookup make_lookup(const Tensor& ids, const std::optional<Tensor>& weights,
                          const std::optional<Tensor>& padding, std::optional<int64_t> padding_id,
                          const char* name, const std::optional<Tensor>& activation,
                          int64_t num_rows, int64_t num_columns, bool shared) {
  check(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
        "position_ids must be int64 or int32, got ",
        torch::headeronly::toString(ids.scalar_type()));
  check(ids.dim() >= 1, "position_ids must have shape [..., K], got a tensor without dimensions");
  const int64_t num_entries = ids.size(ids.dim() - 1);
  check(num_entries >= 1 && num_entries <= kMaxEntries,
        "position_ids must have shape [..., K] with K from 1 to ", kMaxEntries,
        ", got K = ", num_entries);

  Lookup lookup{};
  std::vector<std::pair<const Tensor*, TokenOperand*>> operands = {{&ids, &lookup.ids}};
  static_cast<Operand&>(lookup.ids) = input(ids);
  lookup.ids.last_stride = ids.stride(ids.dim() - 1);
  if (weights) {
    check(weights->scalar_type() == ScalarType::Float, "weights must be float32, got ",
          torch::headeronly::toString(weights->scalar_type()));
    check_same_device("weights", *weights, ids);
    check_token_shape("weights", *weights, ids, num_entries);
    static_cast<Operand&>(lookup.weights) = input(*weights);
    lookup.weights.last_stride = weights->stride(weights->dim() - 1);
    operands.push_back({&*weights, &lookup.weights});
  }
  if (padding) {
    check(padding->scalar_type() == ScalarType::Bool, "padding must be bool, got ",
          torch::headeronly::toString(padding->scalar_type()));
    check_same_device("padding", *padding, ids);
    check_token_shape("padding", *padding, ids, std::nullopt);
    static_cast<Operand&>(lookup.padding) = input(*padding);
    operands.push_back({&*padding, &lookup.padding});
  }
  if (activation) {
    check_floating(name, activation->scalar_type());
    check_same_device(name, *activation, ids);
    check_token_shape(name, *activation, ids, num_columns);
    static_cast<Operand&>(lookup.activation) = input(*activation);
    lookup.activation.last_stride = activation->stride(activation->dim() - 1);
    operands.push_back({&*activation, &lookup.activation});
  }
  merge_token_dims(lookup, ids, operands);

  lookup.num_entries = num_entries;
  lookup.num_rows = num_rows;
  lookup.rows_per_entry = shared ? 0 : num_rows;
  lookup.num_columns = num_columns;
  lookup.has_padding_id = padding_id.has_value();
  lookup.padding_id = padding_id.value_or(0);
  // Clamped ids of 0 need a row 0 to read.
  check(num_rows > 0 || lookup.num_tokens == 0 || num_columns == 0,
        "table must have at least one row to read, got P = 0");
  return lookup;
}

// ---------------------------------------------------------------------------------------------
// Memory.

// PyTorch's own text for the exception that a call of the stable ABI just met on this thread, or
// null: torch 2.13 and later have the function, whatever version this is built for.
inline const char* torch_exception_text() {
  using Function = const char* (*)();
  static const auto function =
      reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return function == nullptr ? nullptr : function();
}

// `name` says what for. The stable ABI's own exception names neither the reason nor the size. The
// words " out of memory." are those by which a training loop knows that it may try a smaller batch
// (accelerate's should_reduce_batch_size).
[[noreturn]] inline void throw_allocation_failed(const char* name, int64_t bytes) {
  std::ostringstream message;
  message << "fused_embedding_lookup failed: cannot allocate " << name << ", " << bytes
          << " bytes:";
  if (const char* text = torch_exception_text()) {
    const std::string reason =
        text;  // on the CPU "DefaultCPUAllocator: can't allocate memory: ..."
    if (reason.find("allocate memory") != std::string::npos) message << " out of memory.";
    message << " " << reason;
    throw std::runtime_error(message.str());
  }
#if defined(CUDA_KERNEL)
  const std::string error = pending_device_error();
  if (!error.empty()) throw std::runtime_error(message.str() + " " + error);
#endif
  throw std::runtime_error(message.str() + " out of memory.");
}

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

// A tensor that nothing has been written to: a result or a workspace, which `name` says.
inline Tensor allocate(const char* name, IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                       torch::stable::Device device) {
  int64_t bytes = element_size(dtype);
  bool overflows = false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    overflows = __builtin_mul_overflow(bytes, sizes[i], &bytes) || overflows;
  }
  check(!overflows, name, " of shape ", Shape{sizes}, " has more bytes than 64 bits can count");
  try {
    return torch::stable::empty(sizes, dtype, std::nullopt, device);
  } catch (const std::runtime_error&) {
    throw_allocation_failed(name, bytes);
  }
}

}  // namespace embedding_lookup

// The contract that every device implements: what a launcher is given, and the checks that make it
// safe to launch. A device folder includes this header and nothing of its siblings.
//
// Forward, for a token t (one index into the leading dimensions "[...]") and a column h:
//
//   e[t, h]   = round_to_table_dtype( sum over k of table[k, max(ids[t, k], 0), h] )
//   out[t, h] = residual[t, h] + (padding[t] ? 0 : e[t, h])
//
// The sum runs over k in order, in float32 (float64 for a float64 table); an axis whose id equals
// padding_id adds zero; the last addition happens in the dtype of `out`, promote(table, residual),
// or in float32 where that is a 16-bit type. These are the roundings of the code it replaces
// (transformers, Gemma4VisionPatchEmbedder), so the results are the same bits.
//
// Backward, the adjoint of e with respect to the table:
//
//   grad_table[k, r, h] = sum of grad[t, h] over the unpadded tokens t whose max(ids[t, k], 0) is r
//
// accumulated in float32 or better, in an order that depends on nothing but the inputs, and
// rounded once.
//
// An id >= num_rows must never be used as an address. On the CPU it is an IndexError, on CUDA a
// device-side assertion; on MPS the forward makes the token's row NaN and the backward leaves the
// token out.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace embedding_lookup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxAxes = 4;

// Leading dimensions left after merging, see merge_token_dims. Contiguous tensors of any rank need
// one, a batch that is expanded or sliced two.
constexpr int kMaxTokenDims = 8;

// What both directions share: which rows each token reads. All strides count elements.
struct Lookup {
  // The leading dimensions "[...]" of ids, padding and rows, outermost first.
  int64_t num_tokens;
  int num_token_dims;
  int64_t token_sizes[kMaxTokenDims];
  int64_t ids_strides[kMaxTokenDims];
  int64_t padding_strides[kMaxTokenDims];
  int64_t rows_strides[kMaxTokenDims];  // of the residual (forward) or the gradient (backward)

  const void* ids;
  bool ids_are_int64;  // else int32
  int64_t ids_axis_stride;

  const bool* padding;  // null: no token is padding

  bool has_padding_id;
  int64_t padding_id;

  int64_t num_axes;  // K
  int64_t num_rows;  // P
  int64_t hidden;    // H
};

struct Forward {
  Lookup lookup;

  const void* table;  // [K, P, H], unit last stride
  ScalarType table_dtype;
  int64_t table_axis_stride;
  int64_t table_row_stride;

  const void* residual;  // [..., H], null: none
  ScalarType residual_dtype;
  int64_t residual_hidden_stride;

  void* out;  // [..., H], contiguous
  ScalarType out_dtype;
};

struct Backward {
  Lookup lookup;

  const void* grad;  // [..., H]
  ScalarType grad_dtype;
  int64_t grad_hidden_stride;

  void* grad_table;  // [K, P, H], contiguous, uninitialised
  ScalarType table_dtype;
};

// The tensors that the pointers were taken from: which device they are on, a source of workspace,
// and on MPS, where an address means nothing, the only way to the memory.
struct ForwardTensors {
  const Tensor& ids;
  const Tensor& table;
  const std::optional<Tensor>& padding;
  const std::optional<Tensor>& residual;
  const Tensor& out;
};

struct BackwardTensors {
  const Tensor& grad;
  const Tensor& ids;
  const std::optional<Tensor>& padding;
  const Tensor& grad_table;
};

// Defined once per device folder; an extension contains one device.
void launch_forward(const Forward& params, const ForwardTensors& tensors);
void launch_backward(const Backward& params, const BackwardTensors& tensors);

// The instruction set in use, as ATEN_CPU_CAPABILITY names it. The CPU's folder only.
std::string cpu_capability();

// ---------------------------------------------------------------------------------------------
// Checks. Each error names the argument, what it got and what it takes.

// std::invalid_argument becomes a ValueError in Python.
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
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
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

// `tensor` must have the leading dimensions of position_ids, followed by `hidden` if that is given.
inline void check_token_shape(const char* name, const Tensor& tensor, const Tensor& ids,
                              std::optional<int64_t> hidden) {
  const int64_t leading = ids.dim() - 1;
  bool matches = tensor.dim() == leading + (hidden ? 1 : 0);
  for (int64_t i = 0; matches && i < leading; ++i) matches = tensor.size(i) == ids.size(i);
  if (matches && hidden) matches = tensor.size(leading) == *hidden;
  if (matches) return;
  std::ostringstream expected;
  for (int64_t i = 0; i < leading; ++i) expected << (i == 0 ? "" : ", ") << ids.size(i);
  if (hidden) expected << (leading == 0 ? "" : ", ") << *hidden;
  check(false, name, " must have shape [", expected.str(), "] to go with position_ids of shape ",
        Shape{ids.sizes()}, ", got ", Shape{tensor.sizes()});
}

// Drops dimensions of size 1 and merges neighbours that are one dimension in every tensor, so that
// the kernels walk as few dimensions as the strides allow. `rows` is the residual or the gradient.
inline void merge_token_dims(Lookup& lookup, const Tensor& ids,
                             const std::optional<Tensor>& padding,
                             const std::optional<Tensor>& rows) {
  lookup.num_tokens = 1;
  lookup.num_token_dims = 0;
  for (int64_t dim = 0; dim < ids.dim() - 1; ++dim) {
    const int64_t size = ids.size(dim);
    const int64_t ids_stride = ids.stride(dim);
    const int64_t padding_stride = padding ? padding->stride(dim) : 0;
    const int64_t rows_stride = rows ? rows->stride(dim) : 0;
    lookup.num_tokens *= size;
    if (size == 1) continue;
    const int last = lookup.num_token_dims - 1;
    if (last >= 0 && lookup.ids_strides[last] == ids_stride * size &&
        lookup.padding_strides[last] == padding_stride * size &&
        lookup.rows_strides[last] == rows_stride * size) {
      lookup.token_sizes[last] *= size;
      lookup.ids_strides[last] = ids_stride;
      lookup.padding_strides[last] = padding_stride;
      lookup.rows_strides[last] = rows_stride;
      continue;
    }
    check(lookup.num_token_dims < kMaxTokenDims, "position_ids of shape ", Shape{ids.sizes()},
          " has more than ", kMaxTokenDims, " leading dimensions whose strides cannot be merged");
    const int next = lookup.num_token_dims++;
    lookup.token_sizes[next] = size;
    lookup.ids_strides[next] = ids_stride;
    lookup.padding_strides[next] = padding_stride;
    lookup.rows_strides[next] = rows_stride;
  }
  if (lookup.num_tokens == 0) lookup.num_token_dims = 0;  // there is no index to decompose
}

// Checks what both directions take and fills what they share.
inline Lookup make_lookup(const Tensor& ids, const std::optional<Tensor>& padding,
                          const std::optional<Tensor>& rows, std::optional<int64_t> padding_id,
                          int64_t num_axes, int64_t num_rows, int64_t hidden) {
  check(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
        "position_ids must be int64 or int32, got ",
        torch::headeronly::toString(ids.scalar_type()));
  check(ids.dim() >= 1, "position_ids must have shape [..., K], got a tensor without dimensions");
  check(num_axes >= 1 && num_axes <= kMaxAxes, "table must have shape [K, P, H] with K from 1 to ",
        kMaxAxes, ", got K = ", num_axes);
  check(ids.size(ids.dim() - 1) == num_axes, "position_ids must have shape [..., ", num_axes,
        "] to go with a table of ", num_axes, " axes, got ", Shape{ids.sizes()});
  if (padding) {
    check(padding->scalar_type() == ScalarType::Bool, "padding must be bool, got ",
          torch::headeronly::toString(padding->scalar_type()));
    check_same_device("padding", *padding, ids);
    check_token_shape("padding", *padding, ids, std::nullopt);
  }

  Lookup lookup{};
  merge_token_dims(lookup, ids, padding, rows);
  lookup.ids = ids.const_data_ptr();
  lookup.ids_are_int64 = ids.scalar_type() == ScalarType::Long;
  lookup.ids_axis_stride = ids.stride(ids.dim() - 1);
  lookup.padding = padding ? static_cast<const bool*>(padding->const_data_ptr()) : nullptr;
  lookup.has_padding_id = padding_id.has_value();
  lookup.padding_id = padding_id.value_or(0);
  lookup.num_axes = num_axes;
  lookup.num_rows = num_rows;
  lookup.hidden = hidden;
  // Clamped ids of 0 need a row 0 to read.
  check(num_rows > 0 || lookup.num_tokens == 0 || hidden == 0,
        "table must have at least one row per axis, got P = 0");
  return lookup;
}

}  // namespace embedding_lookup

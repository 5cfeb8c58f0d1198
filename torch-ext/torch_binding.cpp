// The registered ops: check, allocate the result, hand over to the one device this extension holds.

#include "torch_binding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "embedding_lookup.h"
#include "registration.h"

using embedding_lookup::check;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// torch.promote_types for the floating dtypes that check_floating lets through.
ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b) return a;
  if (a == ScalarType::Double || b == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

std::vector<int64_t> sizes_with_hidden(const Tensor& position_ids, int64_t hidden) {
  const auto sizes = position_ids.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = hidden;
  return result;
}

}  // namespace

Tensor embedding_lookup_forward(const Tensor& position_ids, const Tensor& table,
                                const std::optional<Tensor>& padding,
                                const std::optional<Tensor>& residual,
                                std::optional<int64_t> padding_id) {
  check(table.dim() == 3, "table must have shape [K, P, H], got ",
        embedding_lookup::Shape{table.sizes()});
  const int64_t hidden = table.size(2);
  embedding_lookup::check_same_device("table", table, position_ids);
  embedding_lookup::check_floating("table", table.scalar_type());
  check(table.stride(2) == 1 || hidden <= 1, "table must have a last stride of 1, got ",
        table.stride(2));
  check(position_ids.dim() >= 1,
        "position_ids must have shape [..., K], got a tensor without dimensions");
  if (residual) {
    embedding_lookup::check_same_device("residual", *residual, position_ids);
    embedding_lookup::check_floating("residual", residual->scalar_type());
    embedding_lookup::check_token_shape("residual", *residual, position_ids, hidden);
  }

  embedding_lookup::Forward params{};
  params.lookup = embedding_lookup::make_lookup(position_ids, padding, residual, padding_id,
                                                table.size(0), table.size(1), hidden);
  params.table = table.const_data_ptr();
  params.table_dtype = table.scalar_type();
  params.table_axis_stride = table.stride(0);
  params.table_row_stride = table.stride(1);
  params.out_dtype = table.scalar_type();
  if (residual) {
    params.residual = residual->const_data_ptr();
    params.residual_dtype = residual->scalar_type();
    params.residual_hidden_stride = residual->stride(residual->dim() - 1);
    params.out_dtype = promote(table.scalar_type(), residual->scalar_type());
  }
  Tensor out =
      torch::stable::new_empty(table, sizes_with_hidden(position_ids, hidden), params.out_dtype);
  params.out = out.mutable_data_ptr();
  if (out.numel() > 0) {
    embedding_lookup::launch_forward(params, {position_ids, table, padding, residual, out});
  }
  return out;
}

Tensor embedding_lookup_backward(const Tensor& grad, const Tensor& position_ids,
                                 const std::optional<Tensor>& padding,
                                 std::optional<int64_t> padding_id, int64_t num_rows,
                                 ScalarType dtype) {
  check(position_ids.dim() >= 1,
        "position_ids must have shape [..., K], got a tensor without dimensions");
  check(grad.dim() >= 1, "grad must have shape [..., H], got a tensor without dimensions");
  check(num_rows >= 0, "num_rows must not be negative, got ", num_rows);
  const int64_t num_axes = position_ids.size(position_ids.dim() - 1);
  const int64_t hidden = grad.size(grad.dim() - 1);
  embedding_lookup::check_same_device("grad", grad, position_ids);
  embedding_lookup::check_floating("grad", grad.scalar_type());
  embedding_lookup::check_floating("dtype", dtype);
  embedding_lookup::check_token_shape("grad", grad, position_ids, hidden);

  embedding_lookup::Backward params{};
  params.lookup = embedding_lookup::make_lookup(position_ids, padding, grad, padding_id, num_axes,
                                                num_rows, hidden);
  params.grad = grad.const_data_ptr();
  params.grad_dtype = grad.scalar_type();
  params.grad_hidden_stride = grad.stride(grad.dim() - 1);
  Tensor grad_table = torch::stable::new_empty(grad, {num_axes, num_rows, hidden}, dtype);
  params.grad_table = grad_table.mutable_data_ptr();
  params.table_dtype = dtype;
  if (grad_table.numel() > 0) {
    embedding_lookup::launch_backward(params, {grad, position_ids, padding, grad_table});
  }
  return grad_table;
}

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "forward(Tensor position_ids, Tensor table, Tensor? padding, Tensor? residual, "
      "int? padding_id) -> Tensor");
  ops.def(
      "backward(Tensor grad, Tensor position_ids, Tensor? padding, int? padding_id, "
      "SymInt num_rows, ScalarType dtype) -> Tensor");
#if defined(CPU_KERNEL)
  ops.def("cpu_capability() -> str");
#endif
}

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("cpu_capability", TORCH_BOX(&embedding_lookup::cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
#elif defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
#elif defined(METAL_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, MPS, ops) {
#endif
  ops.impl("forward", TORCH_BOX(&embedding_lookup_forward));
  ops.impl("backward", TORCH_BOX(&embedding_lookup_backward));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

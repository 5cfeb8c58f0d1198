// The registered ops: check, allocate the result, hand over to the one device this extension holds.

#include "torch_binding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "embedding_lookup.h"
#include "pixel_scaling.h"
#include "registration.h"
#include "vision_interpolation.h"

using embedding_lookup::allocate;
using embedding_lookup::check;
using embedding_lookup::check_floating;
using embedding_lookup::Lookup;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// torch.promote_types for the floating dtypes that check_floating lets through.
ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b) return a;
  if (a == ScalarType::Double || b == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

}  // namespace

Tensor embedding_lookup_forward(const Tensor& position_ids, const Tensor& table,
                                const std::optional<Tensor>& weights,
                                const std::optional<Tensor>& padding,
                                const std::optional<Tensor>& residual,
                                std::optional<int64_t> padding_id,
                                std::optional<ScalarType> embedding_dtype) {
  check(table.dim() == 3 || table.dim() == 2, "table must have shape [K, P, H] or [P, H], got ",
        embedding_lookup::Shape{table.sizes()});
  const bool shared = table.dim() == 2;
  const int64_t rows_dim = table.dim() - 2;
  const int64_t hidden = table.size(rows_dim + 1);
  check_floating("table", table.scalar_type());
  embedding_lookup::check_same_device("table", table, position_ids);
  check(table.stride(rows_dim + 1) == 1 || hidden <= 1, "table must have a last stride of 1, got ",
        table.stride(rows_dim + 1));
  Lookup lookup =
      embedding_lookup::make_lookup(position_ids, weights, padding, padding_id, "residual",
                                    residual, table.size(rows_dim), hidden, shared);
  check(shared || table.size(0) == lookup.num_entries, "position_ids must have shape [..., ",
        table.size(0), "] to go with a table of ", table.size(0), " axes, got ",
        embedding_lookup::Shape{position_ids.sizes()});
  static_cast<embedding_lookup::Operand&>(lookup.table) = embedding_lookup::input(table);
  lookup.table.entry_stride = shared ? 0 : table.stride(0);
  lookup.table.row_stride = table.stride(rows_dim);
  lookup.embedding_dtype = embedding_dtype.value_or(table.scalar_type());
  check_floating("embedding_dtype", lookup.embedding_dtype);

  std::vector<int64_t> sizes(position_ids.sizes().begin(), position_ids.sizes().end());
  sizes.back() = hidden;
  const ScalarType out_dtype =
      residual ? promote(lookup.embedding_dtype, residual->scalar_type()) : lookup.embedding_dtype;
  Tensor out = allocate("the result", sizes, out_dtype, position_ids.device());
  lookup.out = embedding_lookup::output(out);
  if (out.numel() > 0) embedding_lookup::launch_forward(lookup, position_ids.device());
  return out;
}

Tensor embedding_lookup_backward(const Tensor& grad, const Tensor& position_ids,
                                 const std::optional<Tensor>& weights,
                                 const std::optional<Tensor>& padding,
                                 std::optional<int64_t> padding_id, int64_t num_rows, bool shared,
                                 ScalarType dtype) {
  check(grad.dim() >= 1, "grad must have shape [..., H], got a tensor without dimensions");
  check(num_rows >= 0, "num_rows must not be negative, got ", num_rows);
  check_floating("dtype", dtype);
  const int64_t hidden = grad.size(grad.dim() - 1);
  Lookup lookup = embedding_lookup::make_lookup(position_ids, weights, padding, padding_id, "grad",
                                                grad, num_rows, hidden, shared);
  std::vector<int64_t> sizes = {num_rows, hidden};
  if (!shared) sizes.insert(sizes.begin(), lookup.num_entries);
  Tensor grad_table = allocate("the table's gradient", sizes, dtype, grad.device());
  static_cast<embedding_lookup::Operand&>(lookup.table) = embedding_lookup::output(grad_table);
  lookup.table.entry_stride = lookup.rows_per_entry * hidden;
  lookup.table.row_stride = hidden;
  if (grad_table.numel() > 0) embedding_lookup::launch_backward(lookup, grad.device());
  return grad_table;
}

std::tuple<Tensor, Tensor> vision_interpolation(const Tensor& grid_thw, int64_t num_grid_per_side,
                                                int64_t num_patches, bool bicubic,
                                                bool align_corners, int64_t spatial_merge_size,
                                                bool zeros) {
  embedding_lookup::Interpolation interpolation = embedding_lookup::make_interpolation(
      grid_thw, num_grid_per_side, num_patches, bicubic, align_corners, spatial_merge_size, zeros);
  const std::vector<int64_t> sizes = {num_patches, bicubic ? 16 : 4};
  Tensor ids = allocate("the ids", sizes, ScalarType::Long, grid_thw.device());
  Tensor weights = allocate("the weights", sizes, ScalarType::Float, grid_thw.device());
  interpolation.ids = embedding_lookup::output(ids);
  interpolation.weights = embedding_lookup::output(weights);
  embedding_lookup::launch_interpolation(interpolation, grid_thw.device());
  return {ids, weights};
}

Tensor pixel_scaling(const Tensor& pixel_values, ScalarType dtype) {
  check_floating("pixel_values", pixel_values.scalar_type());
  check_floating("dtype", dtype);
  Tensor pixels = pixel_values;
  if (!pixels.is_contiguous()) {
    pixels = allocate("contiguous pixels", pixels.sizes(), pixels.scalar_type(), pixels.device());
    torch::stable::copy_(pixels, pixel_values);
  }
  Tensor out = allocate("the scaled pixels", pixels.sizes(), dtype, pixels.device());
  const embedding_lookup::Scaling scaling = {pixels.numel(), embedding_lookup::input(pixels),
                                             embedding_lookup::output(out)};
  if (scaling.count > 0) embedding_lookup::launch_scaling(scaling, pixels.device());
  return out;
}

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "forward(Tensor position_ids, Tensor table, Tensor? weights, Tensor? padding, "
      "Tensor? residual, int? padding_id, ScalarType? embedding_dtype) -> Tensor");
  ops.def(
      "backward(Tensor grad, Tensor position_ids, Tensor? weights, Tensor? padding, "
      "int? padding_id, SymInt num_rows, bool shared, ScalarType dtype) -> Tensor");
  ops.def(
      "interpolation(Tensor grid_thw, int num_grid_per_side, SymInt num_patches, bool bicubic, "
      "bool align_corners, int spatial_merge_size, bool zeros) -> (Tensor, Tensor)");
  ops.def("scaling(Tensor pixel_values, ScalarType dtype) -> Tensor");
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
  ops.impl("interpolation", TORCH_BOX(&vision_interpolation));
  ops.impl("scaling", TORCH_BOX(&pixel_scaling));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

// position_ids [..., K], table [K, P, H] or [P, H], weights [..., K], padding [...],
// residual [..., H] -> [..., H]
torch::stable::Tensor embedding_lookup_forward(
    const torch::stable::Tensor& position_ids, const torch::stable::Tensor& table,
    const std::optional<torch::stable::Tensor>& weights,
    const std::optional<torch::stable::Tensor>& padding,
    const std::optional<torch::stable::Tensor>& residual, std::optional<int64_t> padding_id,
    std::optional<torch::headeronly::ScalarType> embedding_dtype);

// grad [..., H] and what the forward was given -> the table's gradient, [num_rows, H] if the axes
// share one table, else [K, num_rows, H], of dtype `dtype`
torch::stable::Tensor embedding_lookup_backward(const torch::stable::Tensor& grad,
                                                const torch::stable::Tensor& position_ids,
                                                const std::optional<torch::stable::Tensor>& weights,
                                                const std::optional<torch::stable::Tensor>& padding,
                                                std::optional<int64_t> padding_id, int64_t num_rows,
                                                bool shared, torch::headeronly::ScalarType dtype);

// grid_thw [images, 3] -> ids [num_patches, T] int64 and weights [num_patches, T] float32
std::tuple<torch::stable::Tensor, torch::stable::Tensor> vision_interpolation(
    const torch::stable::Tensor& grid_thw, int64_t num_grid_per_side, int64_t num_patches,
    bool bicubic, bool align_corners, int64_t spatial_merge_size, bool zeros);

// pixel_values [...] -> [...] of dtype `dtype`, contiguous
torch::stable::Tensor pixel_scaling(const torch::stable::Tensor& pixel_values,
                                    torch::headeronly::ScalarType dtype);

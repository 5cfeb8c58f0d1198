#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

// position_ids [..., K], table [K, P, H], padding [...], residual [..., H] -> [..., H]
torch::stable::Tensor embedding_lookup_forward(const torch::stable::Tensor& position_ids,
                                               const torch::stable::Tensor& table,
                                               const std::optional<torch::stable::Tensor>& padding,
                                               const std::optional<torch::stable::Tensor>& residual,
                                               std::optional<int64_t> padding_id);

// grad [..., H] and what the forward was given -> grad_table [K, P, H], of dtype `dtype`
torch::stable::Tensor embedding_lookup_backward(const torch::stable::Tensor& grad,
                                                const torch::stable::Tensor& position_ids,
                                                const std::optional<torch::stable::Tensor>& padding,
                                                std::optional<int64_t> padding_id, int64_t num_rows,
                                                torch::headeronly::ScalarType dtype);

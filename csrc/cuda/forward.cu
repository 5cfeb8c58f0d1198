// out[t, h] = residual[t, h] + (padding[t] ? 0 : sum over k of table[k, max(ids[t, k], 0), h])
//
// One warp per token, eight tokens a block; a lane takes every 32nd vector of N columns. Lane k
// reads the token's id on axis k and the warp shares it, so each id is read once. The vectors of
// the residual are requested before the ids are waited for, kUnroll at a time, then those of the
// table.
//
// Memory traffic: the residual is read and the output written once, past the caches; the rows of
// the table in use (about 100 for an image) stay in the caches. For H = 768 in 16 bits that is
// three vectors of 16 bytes a lane, all in flight together.

#include "common.cuh"

namespace embedding_lookup {
namespace {

constexpr int kWarps = 8;
constexpr int kUnroll = 3;

// K axes, or as many as the lookup has if K is 0.
template <typename Table, typename Residual, int N, int K>
__global__ void __launch_bounds__(kWarps* kWarpSize) forward_kernel(const Forward params) {
  // torch.promote_types of two of float32, float16 and bfloat16.
  using Out = std::conditional_t<std::is_same_v<Table, Residual>, Table, float>;
  constexpr int kMaxK = K > 0 ? K : kMaxAxes;
  constexpr int kStep = kWarpSize * N;

  const Lookup& lookup = params.lookup;
  const int num_axes = K > 0 ? K : static_cast<int>(lookup.num_axes);
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t token = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  if (token >= lookup.num_tokens) return;
  const TokenOffsets offsets = token_offsets(lookup, token);

  const auto* residual = static_cast<const Residual*>(params.residual);
  const int64_t residual_stride = N == 1 ? params.residual_hidden_stride : 1;
  Vector<Residual, N> residuals[kUnroll];
  auto load_residuals = [&](int64_t first) {
    if (residual == nullptr) return;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t column = first + u * kStep;
      if (column < lookup.hidden) {
        residuals[u] = load<N, Cache::kStream>(residual + offsets.rows + column * residual_stride);
      }
    }
  };
  load_residuals(lane * N);

  const bool padding = is_padding(lookup, offsets);
  int64_t lane_row = 0;
  bool lane_has_row = false;
  if (lane < num_axes) {
    const int64_t row = load_row(lookup, offsets, lane);
    lane_has_row = row != kNoRow && !padding;
    if (lane_has_row) lane_row = lane * params.table_axis_stride + row * params.table_row_stride;
  }
  const unsigned has_row = __ballot_sync(kAllLanes, lane_has_row);
  const Table* rows[kMaxK];
#pragma unroll
  for (int k = 0; k < kMaxK; ++k) {
    rows[k] = static_cast<const Table*>(params.table) + __shfl_sync(kAllLanes, lane_row, k);
  }

  Out* out = static_cast<Out*>(params.out) + int64_t{token} * lookup.hidden;
  for (int64_t first = lane * N; first < lookup.hidden; first += kUnroll * kStep) {
    // Zeros for an axis without a row, and so a sum of zero for padding.
    Vector<Table, N> terms[kMaxK][kUnroll];
#pragma unroll
    for (int k = 0; k < kMaxK; ++k) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t column = first + u * kStep;
        if ((has_row >> k & 1) != 0 && column < lookup.hidden) {
          terms[k][u] = load<N, Cache::kKeep>(rows[k] + column);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t column = first + u * kStep;
      if (column >= lookup.hidden) break;
      Vector<Out, N> results;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        // Not from 0 on, which would turn a sum of -0 into +0.
        float sum = terms[0][u].get(i);
#pragma unroll
        for (int k = 1; k < kMaxK; ++k) {
          if (k < num_axes) sum += terms[k][u].get(i);
        }
        float result = static_cast<float>(static_cast<Table>(sum));
        if (residual != nullptr) result += residuals[u].get(i);
        results.set(i, result);
      }
      store_streaming<N>(out + column, results);
    }
    load_residuals(first + kUnroll * kStep);
  }
}

}  // namespace

void launch_forward(const Forward& params, const ForwardTensors& tensors) {
  const torch::stable::accelerator::DeviceGuard guard(tensors.table.get_device_index());
  const Lookup& lookup = params.lookup;
  check_num_tokens(lookup);
  const bool has_residual = params.residual != nullptr;
  dispatch(params.table_dtype, [&](auto table_type) {
    dispatch(has_residual ? params.residual_dtype : params.table_dtype, [&](auto residual_type) {
      using Table = typename decltype(table_type)::type;
      using Residual = typename decltype(residual_type)::type;
      constexpr int N = kVectorBytes / std::max(sizeof(Table), sizeof(Residual));
      const bool vectorise =
          lookup.hidden % N == 0 &&
          can_vectorise(params.table, sizeof(Table), N,
                        {params.table_axis_stride, params.table_row_stride}) &&
          (!has_residual || can_vectorise_rows(lookup, params.residual, sizeof(Residual), N,
                                               params.residual_hidden_stride));
      auto kernel = forward_kernel<Table, Residual, 1, 0>;
      if (vectorise) {
        kernel = lookup.num_axes == 2 ? forward_kernel<Table, Residual, N, 2>
                                      : forward_kernel<Table, Residual, N, 0>;
      }
      launch("the forward", kernel, (lookup.num_tokens + kWarps - 1) / kWarps, kWarps * kWarpSize,
             0, current_stream(tensors.table), params);
    });
  });
}

}  // namespace embedding_lookup

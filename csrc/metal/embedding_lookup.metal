// out[t, h] = residual[t, h] + (padding[t] ? 0 : sum over k of table[k, max(ids[t, k], 0), h])
// grad_table[k, r, h] = sum of grad[t, h] over the unpadded tokens t whose max(ids[t, k], 0) is r
//
// See embedding_lookup.h for the roundings. An id >= num_rows is never an address: the forward
// makes the token's row NaN unless it is padding, the backward leaves the token out.
//
// lookup_forward: a simdgroup per token; a lane takes every 32nd vector of N columns, kUnroll of
// them in flight. The residual is read and the output written once; the rows of the table in use
// (about 100 for an image) stay in the caches.
//
// lookup_backward_sort: a threadgroup per axis and tile of kTile tokens sorts the tokens by row,
// and notes where each row's segment begins.
//
// lookup_backward_sum: a threadgroup per row of the table. Its simdgroups deal out the tokens of
// the row's segments among them and add up the gradients; the first adds up their sums. A row
// without segments is zero.
//
// So the backward is two launches without atomics, and what is added in which order depends on the
// ids alone. A token's gradient is read once per axis, K * H * sizeof(Grad) bytes in whole rows,
// with 4 bytes per axis for its place in the order; the table's gradient is written once.

#include <metal_stdlib>

#include "arguments.h"

// Metal's default, fast math, may reorder sums.
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)

using namespace metal;
using namespace embedding_lookup_metal;

// ---------------------------------------------------------------------------------------------
// Vectors of N elements, N = 1 or kVectorWidth, as floats.

template <int N, typename T>
void load_vector(device const T* address, thread float (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = static_cast<float>(*address);
  } else {
    const vec<T, N> vector = *reinterpret_cast<device const vec<T, N>*>(address);
    for (int i = 0; i < N; ++i) values[i] = static_cast<float>(vector[i]);
  }
}

// Rounds.
template <int N, typename T>
void store_vector(device T* address, thread const float (&values)[N]) {
  if constexpr (N == 1) {
    *address = static_cast<T>(values[0]);
  } else {
    vec<T, N> vector;
    for (int i = 0; i < N; ++i) vector[i] = static_cast<T>(values[i]);
    *reinterpret_cast<device vec<T, N>*>(address) = vector;
  }
}

// As integers: compilers set to fast math may take it that there are no NaNs.
template <int N, typename T>
void store_nans(device T* address) {
  using Bits = conditional_t<sizeof(T) == 4, uint, ushort>;
  constexpr Bits kNan = static_cast<Bits>(~Bits(0)) >> 1;
  for (int i = 0; i < N; ++i) reinterpret_cast<device Bits*>(address)[i] = kNan;
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
TokenOffsets token_offsets(constant Lookup& lookup, uint token) {
  TokenOffsets offsets;
  for (int dim = static_cast<int>(lookup.num_token_dims) - 1; dim >= 0; --dim) {
    uint index = token;
    if (dim > 0) {
      index = token % lookup.token_sizes[dim];
      token /= lookup.token_sizes[dim];
    }
    offsets.ids += index * lookup.ids_strides[dim];
    offsets.padding += index * lookup.padding_strides[dim];
    offsets.rows += index * lookup.rows_strides[dim];
  }
  return offsets;
}

bool is_padding(constant Lookup& lookup, device const bool* padding, TokenOffsets offsets) {
  return lookup.has_padding != 0 && padding[offsets.padding];
}

constant constexpr int64_t kNoRow = -1;
constant constexpr int64_t kBadRow = -2;  // not one of the table's

// The table row that a token reads on an axis.
int64_t load_row(constant Lookup& lookup, device const void* ids, TokenOffsets offsets, uint axis) {
  const int64_t offset = offsets.ids + axis * lookup.ids_axis_stride;
  const int64_t id = lookup.ids_are_int64 != 0 ? static_cast<device const int64_t*>(ids)[offset]
                                               : static_cast<device const int32_t*>(ids)[offset];
  if (lookup.has_padding_id != 0 && id == lookup.padding_id) return kNoRow;
  if (id >= lookup.num_rows) return kBadRow;
  return id < 0 ? 0 : id;
}

// ---------------------------------------------------------------------------------------------
// Forward.

// torch.promote_types of two of float, half and bfloat.
template <typename Table, typename Residual>
using Promoted = conditional_t<is_same_v<Table, Residual>, Table, float>;

template <typename Table, typename Residual, int N>
[[kernel]] void lookup_forward(constant Lookup& lookup [[buffer(kLookup)]],
                               device const void* ids [[buffer(kIds)]],
                               device const bool* padding [[buffer(kPadding)]],
                               constant Forward& params [[buffer(kForward)]],
                               device const Table* table [[buffer(kTable)]],
                               device const Residual* residual [[buffer(kResidual)]],
                               device Promoted<Table, Residual>* out [[buffer(kOut)]],
                               uint threadgroup_index [[threadgroup_position_in_grid]],
                               uint simdgroup [[simdgroup_index_in_threadgroup]],
                               uint simdgroups [[simdgroups_per_threadgroup]],
                               uint lane [[thread_index_in_simdgroup]]) {
  constexpr int kUnroll = 3;
  constexpr uint kStep = kSimdWidth * N;

  const uint token = threadgroup_index * simdgroups + simdgroup;
  if (token >= lookup.num_tokens) return;
  const TokenOffsets offsets = token_offsets(lookup, token);

  const bool masked = is_padding(lookup, padding, offsets);
  bool bad = false;
  device const Table* rows[kMaxAxes];  // null: zeros
  for (uint axis = 0; axis < kMaxAxes; ++axis) {
    rows[axis] = nullptr;
    if (axis >= lookup.num_axes || masked) continue;
    const int64_t row = load_row(lookup, ids, offsets, axis);
    bad = bad || row == kBadRow;
    if (row >= 0) {
      rows[axis] = table + axis * params.table_axis_stride + row * params.table_row_stride;
    }
  }

  out += int64_t(token) * lookup.hidden;
  if (bad) {
    for (uint column = lane * N; column < lookup.hidden; column += kStep) {
      store_nans<N>(out + column);
    }
    return;
  }

  const int64_t residual_stride = N == 1 ? params.residual_hidden_stride : 1;
  for (uint first = lane * N; first < lookup.hidden; first += kUnroll * kStep) {
    float residuals[kUnroll][N] = {};
    float sums[kUnroll][N] = {};
    for (int u = 0; u < kUnroll; ++u) {
      const uint column = first + u * kStep;
      if (params.has_residual != 0 && column < lookup.hidden) {
        load_vector<N>(residual + offsets.rows + column * residual_stride, residuals[u]);
      }
    }
    for (uint axis = 0; axis < kMaxAxes; ++axis) {
      if (axis >= lookup.num_axes) break;
      for (int u = 0; u < kUnroll; ++u) {
        const uint column = first + u * kStep;
        float terms[N] = {};
        if (rows[axis] != nullptr && column < lookup.hidden)
          load_vector<N>(rows[axis] + column, terms);
        // The first isn't added to 0, which would turn a sum of -0 into +0.
        for (int i = 0; i < N; ++i) sums[u][i] = axis == 0 ? terms[i] : sums[u][i] + terms[i];
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      const uint column = first + u * kStep;
      if (column >= lookup.hidden) break;
      float results[N];
      for (int i = 0; i < N; ++i) {
        results[i] = static_cast<float>(static_cast<Table>(sums[u][i]));
        if (params.has_residual != 0) results[i] += residuals[u][i];
      }
      store_vector<N>(out + column, results);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Backward.

// segments[table_row, tile] is 1 + where the row's segment begins in the tile's order, or 0;
// order[tile, axis, i] is the token there, counted in the tile, and in a segment's first also the
// segment's length << 16.
[[kernel]] void lookup_backward_sort(
    constant Lookup& lookup [[buffer(kLookup)]], device const void* ids [[buffer(kIds)]],
    device const bool* padding [[buffer(kPadding)]], device ushort* segments [[buffer(kSegments)]],
    device uint* order [[buffer(kOrder)]], threadgroup uint64_t* keys [[threadgroup(0)]],
    uint tile_axis [[threadgroup_position_in_grid]], uint num_tile_axes [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  // Keys are row * kTile + token, all different, so that there is one sorted order.
  constexpr uint64_t kNoKey = ~uint64_t(0);
  const uint tile = tile_axis / lookup.num_axes;
  const uint axis = tile_axis % lookup.num_axes;
  const uint num_tiles = num_tile_axes / lookup.num_axes;

  for (uint i = thread_index; i < kTile; i += num_threads) {
    const uint token = tile * kTile + i;
    keys[i] = kNoKey;
    if (token < lookup.num_tokens) {
      const TokenOffsets offsets = token_offsets(lookup, token);
      const int64_t row = load_row(lookup, ids, offsets, axis);
      if (row >= 0 && !is_padding(lookup, padding, offsets)) {
        keys[i] = static_cast<uint64_t>(row) * kTile + i;
      }
    }
  }

  // Bitonic sort.
  for (uint size = 2; size <= kTile; size *= 2) {
    for (uint stride = size / 2; stride > 0; stride /= 2) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint pair = thread_index; pair < kTile / 2; pair += num_threads) {
        const uint offset = pair & (stride - 1);
        const uint low = (pair - offset) * 2 + offset;
        const uint64_t a = keys[low];
        const uint64_t b = keys[low + stride];
        const bool ascending = (low & size) == 0;
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[low + stride] = a;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = thread_index; i < kTile; i += num_threads) {
    const uint64_t key = keys[i];
    if (key == kNoKey) break;
    const uint64_t row = key / kTile;
    uint entry = key % kTile;
    if (i == 0 || keys[i - 1] / kTile != row) {
      // The first of a segment. Its end: the first key of a later row.
      uint end = i + 1;
      for (uint last = kTile; end < last;) {
        const uint middle = (end + last) / 2;
        if (keys[middle] < (row + 1) * kTile) {
          end = middle + 1;
        } else {
          last = middle;
        }
      }
      entry |= (end - i) << 16;
      segments[(axis * lookup.num_rows + row) * num_tiles + tile] = static_cast<ushort>(i + 1);
    }
    order[int64_t(tile_axis) * kTile + i] = entry;
  }
}

template <typename Grad, typename Table, int N>
[[kernel]] void lookup_backward_sum(constant Lookup& lookup [[buffer(kLookup)]],
                                    device const ushort* segments [[buffer(kSegments)]],
                                    device const uint* order [[buffer(kOrder)]],
                                    constant Backward& params [[buffer(kBackward)]],
                                    device const Grad* grad [[buffer(kGrad)]],
                                    device Table* grad_table [[buffer(kGradTable)]],
                                    threadgroup float* simdgroup_sums [[threadgroup(0)]],
                                    uint table_row [[threadgroup_position_in_grid]],
                                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                                    uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint kColumns = kSimdWidth * N;
  constexpr uint kUnroll = 4;
  const uint axis = static_cast<uint>(table_row / lookup.num_rows);
  segments += int64_t(table_row) * params.num_tiles;
  grad_table += int64_t(table_row) * lookup.hidden;
  threadgroup float* lane_sums = simdgroup_sums + lane * N;

  // A lane looks at a tile.
  bool used = false;
  for (uint first = 0; first < params.num_tiles; first += kSimdWidth) {
    used = used || simd_any(first + lane < params.num_tiles && segments[first + lane] != 0);
  }
  if (!used) {  // the same in all threads
    const float zeros[N] = {};
    for (uint column = simdgroup * kColumns + lane * N; column < lookup.hidden;
         column += kSumSimdgroups * kColumns) {
      store_vector<N>(grad_table + column, zeros);
    }
    return;
  }

  for (uint first_column = 0; first_column < lookup.hidden; first_column += kColumns) {
    const uint column = first_column + lane * N;
    const bool has_column = column < lookup.hidden;
    device const Grad* columns = grad + column * (N == 1 ? params.grad_hidden_stride : 1);

    float sums[N] = {};
    for (uint first = 0; first < params.num_tiles; first += kSimdWidth) {
      const ushort segment = first + lane < params.num_tiles ? segments[first + lane] : 0;
      uint votes = static_cast<uint>(static_cast<simd_vote::vote_t>(simd_ballot(segment != 0)));
      while (votes != 0) {
        const ushort source = static_cast<ushort>(ctz(votes));
        votes &= votes - 1;
        const uint tile = first + source;
        device const uint* entries = order + int64_t(tile * lookup.num_axes + axis) * kTile +
                                     (simd_shuffle(segment, source) - 1);
        const uint length = entries[0] >> 16;

        // A sum of its own for each tile: shorter sums round less.
        float tile_sums[N] = {};
        // Which simdgroup takes the first token differs from tile to tile: a segment may be short.
        for (uint i = (simdgroup + tile) % kSumSimdgroups; i < length;
             i += kUnroll * kSumSimdgroups) {
          float values[kUnroll][N] = {};
          for (uint u = 0; u < kUnroll; ++u) {
            const uint position = i + u * kSumSimdgroups;
            if (position < length && has_column) {
              const uint token = tile * kTile + (entries[position] & 0xffff);
              load_vector<N>(columns + token_offsets(lookup, token).rows, values[u]);
            }
          }
          for (uint u = 0; u < kUnroll; ++u) {
            for (int n = 0; n < N; ++n) tile_sums[n] += values[u][n];
          }
        }
        for (int n = 0; n < N; ++n) sums[n] += tile_sums[n];
      }
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int n = 0; n < N; ++n) lane_sums[simdgroup * kColumns + n] = sums[n];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0 && has_column) {
      for (uint other = 1; other < kSumSimdgroups; ++other) {
        for (int n = 0; n < N; ++n) sums[n] += lane_sums[other * kColumns + n];
      }
      store_vector<N>(grad_table + column, sums);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// What the host finds by name: lookup_forward_<table>_<residual>_<N>,
// lookup_backward_sum_<grad>_<table>_<N>.

#define INSTANTIATE(function, a, b, n)                              \
  template [[host_name(#function "_" #a "_" #b "_" #n)]] [[kernel]] \
  decltype(function<a, b, n>) function<a, b, n>;

#define INSTANTIATE_WIDTHS(function, a, b) \
  INSTANTIATE(function, a, b, 1)           \
  INSTANTIATE(function, a, b, 4)

#define INSTANTIATE_DTYPES(function)          \
  INSTANTIATE_WIDTHS(function, float, float)  \
  INSTANTIATE_WIDTHS(function, float, half)   \
  INSTANTIATE_WIDTHS(function, float, bfloat) \
  INSTANTIATE_WIDTHS(function, half, float)   \
  INSTANTIATE_WIDTHS(function, half, half)    \
  INSTANTIATE_WIDTHS(function, half, bfloat)  \
  INSTANTIATE_WIDTHS(function, bfloat, float) \
  INSTANTIATE_WIDTHS(function, bfloat, half)  \
  INSTANTIATE_WIDTHS(function, bfloat, bfloat)

INSTANTIATE_DTYPES(lookup_forward)
INSTANTIATE_DTYPES(lookup_backward_sum)

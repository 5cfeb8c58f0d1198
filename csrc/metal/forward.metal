// out[t, h] = residual[t, h] + (padding[t] ? 0 : e[t, h]), see embedding_lookup.h.
//
// Both kernels: a threadgroup owns a few tokens at a time, a simdgroup one of them. A lane looks up
// every 32nd entry of the token, then takes every 32nd vector of N columns. The residual is read
// and the output written once; the rows of the table in use (about 100 for an image) stay in the
// caches.

#include "common.h"

constant constexpr int kVectors = 3;  // columns of a lane that are in flight at once, in vectors

// ---------------------------------------------------------------------------------------------
// A token's entries, dealt out to the lanes of its simdgroup.

constant constexpr int kLaneEntries = kMaxEntries / kSimdWidth;

struct LaneEntries {
  int64_t offsets[kLaneEntries];  // of the rows, in elements of the table; kNoRow: adds zero
  float weights[kLaneEntries];

  // Of the token's k-th entry. All lanes ask for the same one.
  METAL_FUNC int64_t offset(uint k) const {
    static_assert(kLaneEntries == 2, "one of two");
    return shuffle(k < kSimdWidth ? offsets[0] : offsets[1], k % kSimdWidth);
  }
  METAL_FUNC float weight(uint k) const {
    return shuffle(k < kSimdWidth ? weights[0] : weights[1], k % kSimdWidth);
  }
};

METAL_FUNC LaneEntries load_entries(constant Lookup& lookup, constant Forward& params,
                                    device const void* ids, device const float* weights,
                                    TokenOffsets offsets, uint token, uint lane,
                                    device ErrorMessages* errors) {
  LaneEntries entries;
  UNROLL for (int i = 0; i < kLaneEntries; ++i) {
    const uint k = i * kSimdWidth + lane;
    entries.offsets[i] = kNoRow;
    entries.weights[i] = 1.0f;
    if (k >= lookup.num_entries) continue;
    const int64_t row = read_row(lookup, ids, offsets, k, token, errors);
    if (row != kNoRow) {
      entries.offsets[i] = k * params.table_entry_stride + row * params.table_row_stride;
    }
    entries.weights[i] = read_weight(lookup, weights, offsets, k);
  }
  return entries;
}

// ---------------------------------------------------------------------------------------------
// Sums.

// Adds kEntries entries from the k-th on to a lane's sums, all of their loads before the first sum.
template <int kEntries, int N, typename Table>
METAL_FUNC void add_rows(device const Table* table, LaneEntries entries, uint k,
                         thread const uint (&columns)[kVectors],
                         thread float (&sums)[kVectors][N]) {
  Vector<Table, N> values[kEntries][kVectors];
  bool present[kEntries];
  UNROLL for (int e = 0; e < kEntries; ++e) {
    const int64_t offset = entries.offset(k + e);
    present[e] = offset != kNoRow;
    device const Table* row = table + (present[e] ? offset : 0);
    UNROLL for (int v = 0; v < kVectors; ++v) values[e][v] = load<N>(row + columns[v]);
  }
  UNROLL for (int e = 0; e < kEntries; ++e) {
    const float weight = entries.weight(k + e);
    UNROLL for (int v = 0; v < kVectors; ++v) {
      UNROLL for (int n = 0; n < N; ++n) {
        const float term = values[e][v].get(n) * weight;
        sums[v][n] += present[e] ? term : 0.0f;
      }
    }
  }
}

METAL_FUNC float round_to(Rounding rounding, float value) {
  if (rounding == kToHalf) return static_cast<float>(static_cast<half>(value));
  if (rounding == kToBfloat) return static_cast<float>(static_cast<bfloat>(value));
  return value;
}

template <typename Table, typename Residual, typename Out, int N>
[[kernel]] void lookup_forward(
    constant Lookup& lookup [[buffer(kLookup)]], device const void* ids [[buffer(kIds)]],
    device const float* weights [[buffer(kWeights)]],
    device const bool* padding [[buffer(kPadding)]],
    device ErrorMessages* errors [[buffer(kErrors)]], constant Forward& params [[buffer(kForward)]],
    device const Table* table [[buffer(kTable)]],
    device const Residual* residual [[buffer(kResidual)]], device Out* out [[buffer(kOut)]],
    uint threadgroup_index [[threadgroup_position_in_grid]],
    uint threadgroups [[threadgroups_per_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const bool has_residual = params.has_residual != 0;
  const int64_t residual_stride = N == 1 ? lookup.activation_last_stride : 1;
  for (uint token = threadgroup_index * simdgroups + simdgroup; token < lookup.num_tokens;
       token += threadgroups * simdgroups) {
    const TokenOffsets offsets = token_offsets(lookup, token);
    const LaneEntries entries =
        load_entries(lookup, params, ids, weights, offsets, token, lane, errors);
    const bool masked = is_padding(lookup, padding, offsets);
    const uint num_entries = masked ? 0 : lookup.num_entries;
    // What leaves the first term as it is; with weights eager's sum begins at +0.
    const float start = masked || lookup.has_weights != 0 ? 0.0f : -0.0f;

    for (uint first = 0; first < lookup.num_columns; first += kVectors * kSimdWidth * N) {
      uint columns[kVectors];  // past the last vector: the last one again, and not written
      float sums[kVectors][N];
      Vector<Residual, N> residuals[kVectors] = {};
      UNROLL for (int v = 0; v < kVectors; ++v) {
        columns[v] = min(first + (v * kSimdWidth + lane) * N, lookup.num_columns - N);
        UNROLL for (int n = 0; n < N; ++n) sums[v][n] = start;
      }
      if (has_residual) {
        UNROLL for (int v = 0; v < kVectors; ++v) {
          residuals[v] = load<N>(residual + offsets.activation + columns[v] * residual_stride);
        }
      }
      uint k = 0;
      for (; k + 2 <= num_entries; k += 2) add_rows<2, N>(table, entries, k, columns, sums);
      if (k < num_entries) add_rows<1, N>(table, entries, k, columns, sums);
      UNROLL for (int v = 0; v < kVectors; ++v) {
        Vector<Out, N> results;
        UNROLL for (int n = 0; n < N; ++n) {
          const float embedding = round_to(params.embedding, sums[v][n]);
          results.set(n, has_residual ? residuals[v].get(n) + embedding : embedding);
        }
        if (first + (v * kSimdWidth + lane) * N < lookup.num_columns) {
          store(out + int64_t(token) * lookup.num_columns + columns[v], results);
        }
      }
    }
  }
}

// One entry, no weights, no residual: the row as it is, bit by bit, as an index copies it.
template <typename Bits, int N>
[[kernel]] void lookup_copy(
    constant Lookup& lookup [[buffer(kLookup)]], device const void* ids [[buffer(kIds)]],
    device const bool* padding [[buffer(kPadding)]],
    device ErrorMessages* errors [[buffer(kErrors)]], constant Forward& params [[buffer(kForward)]],
    device const Bits* table [[buffer(kTable)]], device Bits* out [[buffer(kOut)]],
    uint threadgroup_index [[threadgroup_position_in_grid]],
    uint threadgroups [[threadgroups_per_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  for (uint token = threadgroup_index * simdgroups + simdgroup; token < lookup.num_tokens;
       token += threadgroups * simdgroups) {
    const TokenOffsets offsets = token_offsets(lookup, token);
    int64_t row = kNoRow;
    if (lane == 0) row = read_row(lookup, ids, offsets, 0, token, errors);
    row = shuffle(row, 0);
    if (is_padding(lookup, padding, offsets)) row = kNoRow;
    device const Bits* from = table + (row == kNoRow ? 0 : row * params.table_row_stride);

    for (uint first = 0; first < lookup.num_columns; first += kVectors * kSimdWidth * N) {
      Vector<Bits, N> values[kVectors];
      UNROLL for (int v = 0; v < kVectors; ++v) {
        values[v] =
            load<N>(from + min(first + (v * kSimdWidth + lane) * N, lookup.num_columns - N));
      }
      // Else a compiler moves a load to the store, which is conditional, and waits there.
      simdgroup_barrier(mem_flags::mem_none);
      UNROLL for (int v = 0; v < kVectors; ++v) {
        const uint column = first + (v * kSimdWidth + lane) * N;
        if (row == kNoRow) values[v] = {};
        if (column < lookup.num_columns) {
          store(out + int64_t(token) * lookup.num_columns + column, values[v]);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// What the host finds by name: lookup_forward_<table>_<residual>_<out>_<N>, lookup_copy_<bits>_<N>.

#define INSTANTIATE_FORWARD(a, b, c, n)                                        \
  template [[host_name("lookup_forward_" #a "_" #b "_" #c "_" #n)]] [[kernel]] \
  decltype(lookup_forward<a, b, c, n>) lookup_forward<a, b, c, n>;

// The output has the residual's dtype if the embedding has it too, or if it is float.
#define INSTANTIATE_RESIDUALS(table, n)         \
  INSTANTIATE_FORWARD(table, float, float, n)   \
  INSTANTIATE_FORWARD(table, half, half, n)     \
  INSTANTIATE_FORWARD(table, half, float, n)    \
  INSTANTIATE_FORWARD(table, bfloat, bfloat, n) \
  INSTANTIATE_FORWARD(table, bfloat, float, n)

#define INSTANTIATE_COPY(a, n)                                \
  template [[host_name("lookup_copy_" #a "_" #n)]] [[kernel]] \
  decltype(lookup_copy<a, n>) lookup_copy<a, n>;

#define INSTANTIATE_WIDTH(n)       \
  INSTANTIATE_RESIDUALS(float, n)  \
  INSTANTIATE_RESIDUALS(half, n)   \
  INSTANTIATE_RESIDUALS(bfloat, n) \
  INSTANTIATE_COPY(uint, n)        \
  INSTANTIATE_COPY(ushort, n)

INSTANTIATE_WIDTH(1)
INSTANTIATE_WIDTH(4)

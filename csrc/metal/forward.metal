// out[t, h] = residual[t, h] + (padding[t] ? 0 : e[t, h]), see embedding_lookup.h.
//
//   lookup_forward   a threadgroup owns a few tokens at a time, a simdgroup one of them, a thread
//                    every 32nd entry of that and every 32nd vector of N columns. A load is waited
//                    for only when all that can be requested before it has been:
//
//                      1. ids, weights and padding
//                      2. the residual            so that it arrives with the ids, not after them
//                      3. the entries' rows       their addresses need the ids
//                      4. the sums
//
//   lookup_copy      the same, of the one row that a token reads.
//
// The residual is read and the output written once; the rows of the table in use (about 100 for an
// image) stay in the caches.

#include "common.h"

// Columns of a thread that are in flight at once, in vectors. tests/devices/test_metal.py counts
// the loads that it makes.
constant constexpr int kUnroll = 3;

// ---------------------------------------------------------------------------------------------
// A thread's columns from `first` on: kUnroll vectors.

template <int N>
METAL_FUNC bool has_column(constant Lookup& lookup, uint first, int u, uint lane) {
  return first + (u * kSimdWidth + lane) * N < lookup.num_columns;
}
// Past the last vector the last one again, which is read and not written.
template <int N>
METAL_FUNC uint column_at(constant Lookup& lookup, uint first, int u, uint lane) {
  return min(first + (u * kSimdWidth + lane) * N, lookup.num_columns - N);
}

// ---------------------------------------------------------------------------------------------
// Requests.

// Of -0, which changes no bit of a sum, if there is no residual.
template <typename Residual, int N>
METAL_FUNC void load_residuals(constant Lookup& lookup, constant Forward& params,
                               device const Residual* residual, uint first, uint lane,
                               thread Vector<Residual, N> (&residuals)[kUnroll]) {
  const int64_t stride = N == 1 ? lookup.activation_last_stride : 1;
  if (params.has_residual != 0) {
    UNROLL for (int u = 0; u < kUnroll; ++u) {
      residuals[u] = load<N>(residual + column_at<N>(lookup, first, u, lane) * stride);
    }
  } else {
    UNROLL for (int u = 0; u < kUnroll; ++u) {
      UNROLL for (int n = 0; n < N; ++n) residuals[u].set(n, -0.0f);
    }
  }
}

// The entries of a simdgroup's token, kSlots a lane: entry k is in slot k / 32 of lane k % 32.
constant constexpr int kSlots = 2;

struct Entries {
  int64_t ids[kSlots];
  float weights[kSlots];
  int64_t offsets[kSlots];  // of the row, from the table's first element
  uint rows[kSlots];        // a bit for each lane whose entry has a row

  // The last one again for the lanes that have none: a branch would be waited in.
  METAL_FUNC void request(constant Lookup& lookup, device const void* all_ids,
                          device const float* all_weights, TokenOffsets token, uint lane) {
    static_assert(kMaxEntries == kSlots * kSimdWidth, "what the slots of all lanes hold");
    UNROLL for (int slot = 0; slot < kSlots; ++slot) {
      const uint k = min(slot * kSimdWidth + lane, lookup.num_entries - 1);
      ids[slot] = load_id(lookup, all_ids, token, k);
      weights[slot] = read_weight(lookup, all_weights, token, k);
    }
  }

  METAL_FUNC void resolve(constant Lookup& lookup, constant Forward& params, bool padding,
                          uint token, uint lane, device ErrorMessages* errors) {
    UNROLL for (int slot = 0; slot < kSlots; ++slot) {
      const uint k = slot * kSimdWidth + lane;
      int64_t row = kNoRow;
      if (k < lookup.num_entries) row = resolve_row(lookup, ids[slot], padding, k, token, errors);
      rows[slot] = vote(row != kNoRow);
      offsets[slot] =
          row == kNoRow ? 0 : k * params.table_entry_stride + row * params.table_row_stride;
    }
  }

  // What the lane that looks after entry k knows, on all lanes.
  METAL_FUNC bool has_row(uint k) const {
    return ((k < kSimdWidth ? rows[0] : rows[1]) >> k % kSimdWidth & 1) != 0;
  }
  METAL_FUNC int64_t offset_of(uint k) const {
    return shuffle(k < kSimdWidth ? offsets[0] : offsets[1], k % kSimdWidth);
  }
  METAL_FUNC float weight_of(uint k) const {
    return shuffle(k < kSimdWidth ? weights[0] : weights[1], k % kSimdWidth);
  }
};

// ---------------------------------------------------------------------------------------------
// Sums.

// The rows of kBatch entries from `entry` on, added in order: all of their loads before the first
// sum.
template <int kBatch, int N, typename Table>
METAL_FUNC void add_rows(constant Lookup& lookup, device const Table* table, Entries entries,
                         uint entry, uint first, uint lane, thread float (&sums)[kUnroll][N]) {
  Vector<Table, N> terms[kBatch][kUnroll];
  UNROLL for (int b = 0; b < kBatch; ++b) {
    device const Table* row = table + entries.offset_of(entry + b);
    UNROLL for (int u = 0; u < kUnroll; ++u) {
      terms[b][u] = load<N>(row + column_at<N>(lookup, first, u, lane));
    }
  }
  UNROLL for (int b = 0; b < kBatch; ++b) {
    const bool has_row = entries.has_row(entry + b);
    const float weight = entries.weight_of(entry + b);
    UNROLL for (int u = 0; u < kUnroll; ++u) {
      UNROLL for (int n = 0; n < N; ++n) {
        const float term = terms[b][u].get(n) * weight;
        sums[u][n] += has_row ? term : 0.0f;
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
  for (uint token = threadgroup_index * simdgroups + simdgroup; token < lookup.num_tokens;
       token += threadgroups * simdgroups) {
    const TokenOffsets offsets = token_offsets(lookup, token);
    device const Residual* token_residual = residual + offsets.activation;
    Entries entries;
    entries.request(lookup, ids, weights, offsets, lane);
    const bool pads = is_padding(lookup, padding, offsets);
    Vector<Residual, N> residuals[kUnroll];
    load_residuals<Residual, N>(lookup, params, token_residual, 0, lane, residuals);
    entries.resolve(lookup, params, pads, token, lane, errors);

    const bool has_rows = (entries.rows[0] | entries.rows[1]) != 0;
    const uint num_entries = has_rows ? lookup.num_entries : 0;
    // From -0 on, which changes no bit of the first term; with weights from +0, as eager's sum
    // does. And +0 is the sum of no rows.
    const float zero = has_rows && lookup.has_weights == 0 ? -0.0f : 0.0f;
    for (uint first = 0; first < lookup.num_columns; first += kUnroll * kSimdWidth * N) {
      if (first > 0) {
        load_residuals<Residual, N>(lookup, params, token_residual, first, lane, residuals);
      }
      float sums[kUnroll][N];
      UNROLL for (int i = 0; i < kUnroll * N; ++i) sums[i / N][i % N] = zero;
      uint k = 0;
      for (; k + 2 <= num_entries; k += 2) {
        add_rows<2, N>(lookup, table, entries, k, first, lane, sums);
      }
      if (k < num_entries) add_rows<1, N>(lookup, table, entries, k, first, lane, sums);
      UNROLL for (int u = 0; u < kUnroll; ++u) {
        Vector<Out, N> results;
        UNROLL for (int n = 0; n < N; ++n) {
          results.set(n, residuals[u].get(n) + round_to(params.embedding, sums[u][n]));
        }
        if (has_column<N>(lookup, first, u, lane)) {
          store(out + int64_t(token) * lookup.num_columns + column_at<N>(lookup, first, u, lane),
                results);
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
    const int64_t id = load_id(lookup, ids, offsets, 0);
    const bool pads = is_padding(lookup, padding, offsets);
    int64_t row = kNoRow;
    if (lane == 0) row = resolve_row(lookup, id, pads, 0, token, errors);  // one lane reports
    row = shuffle(row, 0);
    device const Bits* from = table + (row == kNoRow ? 0 : row * params.table_row_stride);

    for (uint first = 0; first < lookup.num_columns; first += kUnroll * kSimdWidth * N) {
      Vector<Bits, N> values[kUnroll];
      UNROLL for (int u = 0; u < kUnroll; ++u) {
        values[u] = load<N>(from + column_at<N>(lookup, first, u, lane));
      }
      // Else a compiler moves a load to the store, which is conditional, and waits there.
      simdgroup_barrier(mem_flags::mem_none);
      UNROLL for (int u = 0; u < kUnroll; ++u) {
        if (row == kNoRow) {
          UNROLL for (int n = 0; n < N; ++n) values[u].set(n, 0.0f);
        }
        if (has_column<N>(lookup, first, u, lane)) {
          store(out + int64_t(token) * lookup.num_columns + column_at<N>(lookup, first, u, lane),
                values[u]);
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

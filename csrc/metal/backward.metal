// grad_table[r, h] = sum of weights[t, k] * grad[t, h] over the entries (t, k) that read row r
//
// Entries are numbered in the order of tokens, token * K + k. A tile is sorted by (row, entry):
// that is its `order`, and where an entry stands there is its `position`. A run of params.min_run
// entries or more is divided into pieces, each of which becomes a partial. A row's gradient is a
// sum of *addends*: partials, and the entries of shorter runs. A `list` is the addends of some
// neighbouring tiles, sorted by row and, within a row, in the order of tokens.
//
//   lookup_backward_sort     a threadgroup owns a tile, a thread some of its entries, a simdgroup
//                            nothing. Emits the tile's order, its pieces and its list.
//   lookup_backward_merge    makes one list of two neighbours', until there is one. A threadgroup
//                            owns a tile's share of a list, a thread some of the addends.
//   lookup_backward_starts   notes where each row's addends begin. As above.
//   lookup_backward_pieces   a threadgroup owns every kTileParts-th piece of a tile, a simdgroup
//                            every n-th block of 32 vectors of N columns, a thread one vector of
//                            each. Tiles follow one another, so that what a token's other entries
//                            read again is still in the last cache.
//   lookup_backward_rows     a threadgroup owns a row at a time, simdgroups and threads its columns
//                            as above.
//
// So the gradient is read from memory once, the table's gradient written once, and there are
// partials only where each stands for many rows of the gradient. No float is added atomically: what
// is added in which order depends on the ids, the padding and the shapes alone.

#include "common.h"

// ---------------------------------------------------------------------------------------------
// A tile in threadgroup memory, in the order (row, entry). Past its entries kNoKey.

constant constexpr uint kNoKey = ~0u;

struct Tile {
  threadgroup uint* rows;
  threadgroup ushort* entries;  // counted in the tile

  METAL_FUNC bool is_after(uint i, uint j) const {
    return rows[i] > rows[j] || (rows[i] == rows[j] && entries[i] > entries[j]);
  }
  METAL_FUNC void swap(uint i, uint j) const {
    const uint row = rows[i];
    const ushort entry = entries[i];
    rows[i] = rows[j];
    entries[i] = entries[j];
    rows[j] = row;
    entries[j] = entry;
  }
  // How many of the first `size` rows are less than `row`.
  METAL_FUNC uint lower_bound(uint size, uint row) const {
    uint begin = 0;
    while (begin < size) {
      const uint middle = (begin + size) / 2;
      if (rows[middle] < row) {
        begin = middle + 1;
      } else {
        size = middle;
      }
    }
    return begin;
  }
};

// Bitonic. `size` is a power of two.
METAL_FUNC void sort(Tile tile, uint size, uint thread_index, uint num_threads) {
  for (uint width = 2; width <= size; width *= 2) {
    for (uint stride = width / 2; stride > 0; stride /= 2) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint pair = thread_index; pair < size / 2; pair += num_threads) {
        const uint offset = pair & (stride - 1);
        const uint low = (pair - offset) * 2 + offset;
        const bool ascending = (low & width) == 0;
        if (tile.is_after(low, low + stride) == ascending) tile.swap(low, low + stride);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// What position i of a sorted tile of `size` entries gives rise to.
struct Position {
  bool begins_piece;
  bool is_addend;  // of itself: its run has no piece
  ushort piece_length;
};

METAL_FUNC Position examine(Tile tile, uint size, uint min_run, uint i) {
  Position result = {false, false, 0};
  if (i >= size) return result;
  const uint row = tile.rows[i];
  const uint begin = tile.lower_bound(size, row);
  const uint end = tile.lower_bound(size, row + 1);
  const uint length = end - begin;
  result.is_addend = length < min_run;
  // All but the last as long as one another.
  const uint num_pieces = length < kPiece ? 1 : length / kPiece;
  const uint piece_length = (length + num_pieces - 1) / num_pieces;
  result.begins_piece = !result.is_addend && (i - begin) % piece_length == 0;
  result.piece_length = static_cast<ushort>(min(piece_length, end - i));
  return result;
}

// Fills a tile with the entries from first_entry on, and `size` with ones that read no row.
METAL_FUNC void load_tile(Tile tile, uint size, constant Lookup& lookup, device const void* ids,
                          device const bool* padding, device ErrorMessages* errors,
                          uint rows_per_entry, uint first_entry, uint num_entries,
                          uint thread_index, uint num_threads) {
  for (uint i = thread_index; i < size; i += num_threads) {
    tile.rows[i] = kNoKey;
    tile.entries[i] = static_cast<ushort>(i);
    if (i >= num_entries) continue;
    const uint token = (first_entry + i) / lookup.num_entries;
    const uint k = (first_entry + i) % lookup.num_entries;
    const TokenOffsets offsets = token_offsets(lookup, token);
    const int64_t row = resolve_row(lookup, load_id(lookup, ids, offsets, k),
                                    is_padding(lookup, padding, offsets), k, token, errors);
    if (row != kNoRow) tile.rows[i] = k * rows_per_entry + static_cast<uint>(row);
  }
}

// The sum of what the simdgroups of a threadgroup bring, and of those before this one.
struct Counts {
  uint before, all;
};
METAL_FUNC Counts add_up(threadgroup uint* counts, uint count, uint simdgroup, uint simdgroups,
                         uint lane) {
  if (lane == 0) counts[simdgroup] = count;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Counts result = {0, 0};
  for (uint i = 0; i < simdgroups; ++i) {
    if (i < simdgroup) result.before += counts[i];
    result.all += counts[i];
  }
  return result;
}

[[kernel]] void lookup_backward_sort(
    constant Lookup& lookup [[buffer(kLookup)]], device const void* ids [[buffer(kIds)]],
    device const bool* padding [[buffer(kPadding)]],
    device ErrorMessages* errors [[buffer(kErrors)]],
    constant Backward& params [[buffer(kBackward)]], device ushort* order [[buffer(kOrder)]],
    device Piece* pieces [[buffer(kPieces)]], device uint* num_pieces [[buffer(kNumPieces)]],
    device Addend* addends [[buffer(kAddends)]], device uint* num_addends [[buffer(kNumAddends)]],
    threadgroup uint* memory [[threadgroup(0)]], uint tile_index [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint* counts = memory + kTile;
  const Tile tile = {memory, reinterpret_cast<threadgroup ushort*>(counts + 2 * kSimdWidth)};
  const uint first_entry = tile_index * params.tile_entries;
  const uint num_entries =
      min(params.tile_entries, lookup.num_tokens * lookup.num_entries - first_entry);
  uint size = 1;
  while (size < num_entries) size *= 2;
  load_tile(tile, size, lookup, ids, padding, errors, params.rows_per_entry, first_entry,
            num_entries, thread_index, num_threads);
  sort(tile, size, thread_index, num_threads);

  const uint num_sorted = tile.lower_bound(size, kNoKey);
  const int64_t first = int64_t(tile_index) * kTile;
  const uint first_partial = tile_index * params.tile_partials;
  uint total_pieces = 0;
  uint total_addends = 0;
  for (uint block = 0; block < num_sorted; block += num_threads) {
    const uint i = block + thread_index;
    const Position position = examine(tile, num_sorted, params.min_run, i);
    const bool is_addend = position.begins_piece || position.is_addend;
    const uint piece_votes = vote(position.begins_piece);
    const uint addend_votes = vote(is_addend);
    const Counts block_pieces = add_up(counts, popcount(piece_votes), simdgroup, simdgroups, lane);
    const Counts block_addends =
        add_up(counts + kSimdWidth, popcount(addend_votes), simdgroup, simdgroups, lane);
    const uint before = (1u << lane) - 1;
    const uint piece = total_pieces + block_pieces.before + popcount(piece_votes & before);
    const uint addend = total_addends + block_addends.before + popcount(addend_votes & before);
    if (position.begins_piece) {
      pieces[first_partial + piece].begin = static_cast<ushort>(i);
      pieces[first_partial + piece].length = position.piece_length;
    }
    if (is_addend) {
      addends[first + addend].row = tile.rows[i];
      addends[first + addend].index =
          position.begins_piece
              ? first_partial + piece
              : params.num_tiles * params.tile_partials + first_entry + tile.entries[i];
    }
    if (i < num_sorted) order[first + i] = tile.entries[i];
    total_pieces += block_pieces.all;
    total_addends += block_addends.all;
  }
  if (thread_index == 0) {
    num_pieces[tile_index] = total_pieces;
    num_addends[tile_index] = total_addends;
  }
}

// ---------------------------------------------------------------------------------------------
// One list of all addends.

// How many of the list's `size` addends have a row less than `row`.
METAL_FUNC uint lower_bound(device const Addend* addends, uint size, uint row) {
  uint begin = 0;
  while (begin < size) {
    const uint middle = (begin + size) / 2;
    if (addends[middle].row < row) {
      begin = middle + 1;
    } else {
      size = middle;
    }
  }
  return begin;
}

// Of addends with one row those of the first list come first: they stay in the order of tiles.
[[kernel]] void lookup_backward_merge(constant Backward& params [[buffer(kBackward)]],
                                      device const Addend* addends [[buffer(kAddends)]],
                                      device const uint* num_addends [[buffer(kNumAddends)]],
                                      device Addend* merged [[buffer(kMerged)]],
                                      device uint* num_merged [[buffer(kNumMerged)]],
                                      uint tile [[threadgroup_position_in_grid]],
                                      uint thread_index [[thread_position_in_threadgroup]],
                                      uint num_threads [[threads_per_threadgroup]]) {
  const uint list = tile / params.list_tiles;
  const uint other = list ^ 1;
  const bool has_other = other * params.list_tiles < params.num_tiles;
  const uint size = num_addends[list];
  const uint other_size = has_other ? num_addends[other] : 0;
  const int64_t list_entries = int64_t(params.list_tiles) * kTile;
  device const Addend* own = addends + list * list_entries;
  device const Addend* others = addends + other * list_entries;
  merged += list / 2 * 2 * list_entries;

  const uint first = (tile - list * params.list_tiles) * kTile;
  for (uint i = first + thread_index; i < min(first + kTile, size); i += num_threads) {
    const uint row = own[i].row;
    const uint place = i + lower_bound(others, other_size, row + (list & 1));
    merged[place].row = row;
    merged[place].index = own[i].index;
  }
  if (first + thread_index == 0 && (list & 1) == 0) num_merged[list / 2] = size + other_size;
}

// starts[row] is 1 + where the row's addends begin, or 0, which it is before.
[[kernel]] void lookup_backward_starts(device const Addend* addends [[buffer(kAddends)]],
                                       device const uint* num_addends [[buffer(kNumAddends)]],
                                       device uint* starts [[buffer(kStarts)]],
                                       uint tile [[threadgroup_position_in_grid]],
                                       uint thread_index [[thread_position_in_threadgroup]],
                                       uint num_threads [[threads_per_threadgroup]]) {
  const uint first = tile * kTile;
  for (uint i = first + thread_index; i < min(first + kTile, num_addends[0]); i += num_threads) {
    const uint row = addends[i].row;
    if (i == 0 || addends[i - 1].row != row) starts[row] = i + 1;
  }
}

// ---------------------------------------------------------------------------------------------
// Sums.

// Adds the vectors at the first `count` lanes' offsets, times those lanes' weights, in the order of
// lanes. kBatch loads before the first sum; past the last the last one again, and not added.
template <int N, typename T>
METAL_FUNC void add_vectors(device const T* columns, int64_t offset, float weight, uint count,
                            thread float (&sums)[N]) {
  constexpr int kBatch = 8;
  for (uint first = 0; first < count; first += kBatch) {
    Vector<T, N> values[kBatch];
    UNROLL for (int i = 0; i < kBatch; ++i) {
      values[i] = load<N>(columns + shuffle(offset, min(first + i, count - 1)));
    }
    UNROLL for (int i = 0; i < kBatch; ++i) {
      const float value_weight = shuffle(weight, min(first + i, count - 1));
      UNROLL for (int n = 0; n < N; ++n) {
        const float term = values[i].get(n) * value_weight;
        sums[n] += first + i < count ? term : 0.0f;
      }
    }
  }
}

// Where a lane's entry has its gradient, and what it counts.
struct EntryGrad {
  int64_t offset;
  float weight;
};
METAL_FUNC EntryGrad locate(constant Lookup& lookup, device const float* weights, uint entry) {
  const uint token = entry / lookup.num_entries;
  const TokenOffsets offsets = token_offsets(lookup, token);
  return {offsets.activation,
          read_weight(lookup, weights, offsets, entry - token * lookup.num_entries)};
}

template <typename Grad, int N>
[[kernel]] void lookup_backward_pieces(
    constant Lookup& lookup [[buffer(kLookup)]], device const float* weights [[buffer(kWeights)]],
    constant Backward& params [[buffer(kBackward)]], device const Grad* grad [[buffer(kGrad)]],
    device const ushort* order [[buffer(kOrder)]], device const Piece* pieces [[buffer(kPieces)]],
    device const uint* num_pieces [[buffer(kNumPieces)]],
    device float* partials [[buffer(kPartials)]], uint tile_part [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint tile = tile_part / kTileParts;
  const int64_t grad_stride = N == 1 ? lookup.activation_last_stride : 1;
  for (uint i = tile_part % kTileParts; i < num_pieces[tile]; i += kTileParts) {
    const int64_t partial = int64_t(tile) * params.tile_partials + i;
    const uint begin = pieces[partial].begin;
    const uint length = pieces[partial].length;
    for (uint block = simdgroup * kSimdWidth * N; block < lookup.num_columns;
         block += simdgroups * kSimdWidth * N) {
      const uint column = min(block + lane * N, lookup.num_columns - N);
      float sums[N] = {0};
      for (uint first = 0; first < length; first += kSimdWidth) {
        const uint position = begin + min(first + lane, length - 1);
        const EntryGrad entry = locate(
            lookup, weights, tile * params.tile_entries + order[int64_t(tile) * kTile + position]);
        add_vectors<N>(grad + column * grad_stride, entry.offset, entry.weight,
                       min(length - first, uint(kSimdWidth)), sums);
      }
      if (block + lane * N < lookup.num_columns) {
        Vector<float, N> results;
        UNROLL for (int n = 0; n < N; ++n) results.set(n, sums[n]);
        store(partials + partial * lookup.num_columns + column, results);
      }
    }
  }
}

// A row's next addends, one a lane, as far as they are of one kind.
struct Addends {
  uint index;  // of the lane's; past the last, the last one's
  uint count;
  bool are_partials;
  bool are_last;  // of the row
};
METAL_FUNC Addends next_addends(device const Addend* addends, uint num_addends, uint num_partials,
                                uint row, uint position, uint lane) {
  const uint own = min(position + lane, num_addends - 1);
  const uint index = addends[own].index;
  const uint of_row = vote(position + lane < num_addends && addends[own].row == row);
  const uint partials = vote(index < num_partials);
  const bool are_partials = (partials & 1) != 0;
  const uint alike = of_row & (are_partials ? partials : ~partials);
  const uint count = popcount(alike & ~(alike + 1));  // the lanes before the first that isn't
  return {shuffle(index, min(lane, count - 1)), count, are_partials,
          count < kSimdWidth && count == popcount(of_row)};
}

template <typename Grad, typename Table, int N>
[[kernel]] void lookup_backward_rows(
    constant Lookup& lookup [[buffer(kLookup)]], device const float* weights [[buffer(kWeights)]],
    constant Backward& params [[buffer(kBackward)]], device const Grad* grad [[buffer(kGrad)]],
    device Table* grad_table [[buffer(kGradTable)]],
    device const float* partials [[buffer(kPartials)]],
    device const Addend* addends [[buffer(kAddends)]],
    device const uint* num_addends [[buffer(kNumAddends)]],
    device const uint* starts [[buffer(kStarts)]],
    uint threadgroup_index [[threadgroup_position_in_grid]],
    uint threadgroups [[threadgroups_per_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int64_t grad_stride = N == 1 ? lookup.activation_last_stride : 1;
  const uint num_partials = params.num_tiles * params.tile_partials;
  for (uint row = threadgroup_index; row < params.total_rows; row += threadgroups) {
    const uint start = starts[row];
    for (uint block = simdgroup * kSimdWidth * N; block < lookup.num_columns;
         block += simdgroups * kSimdWidth * N) {
      const uint column = min(block + lane * N, lookup.num_columns - N);
      float sums[N] = {0};
      bool more = start != 0;
      for (uint position = start - 1; more;) {
        const Addends next =
            next_addends(addends, num_addends[0], num_partials, row, position, lane);
        if (next.count == 0) break;
        if (next.are_partials) {
          add_vectors<N>(partials + column, int64_t(next.index) * lookup.num_columns, 1.0f,
                         next.count, sums);
        } else {
          const EntryGrad entry = locate(lookup, weights, next.index - num_partials);
          add_vectors<N>(grad + column * grad_stride, entry.offset, entry.weight, next.count, sums);
        }
        position += next.count;
        more = !next.are_last;
      }
      if (block + lane * N < lookup.num_columns) {
        Vector<Table, N> results;
        UNROLL for (int n = 0; n < N; ++n) results.set(n, sums[n]);
        store(grad_table + int64_t(row) * lookup.num_columns + column, results);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// What the host finds by name, besides: lookup_backward_pieces_<grad>_<N>,
// lookup_backward_rows_<grad>_<table>_<N>.

#define INSTANTIATE_PIECES(a, n)                                         \
  template [[host_name("lookup_backward_pieces_" #a "_" #n)]] [[kernel]] \
  decltype(lookup_backward_pieces<a, n>) lookup_backward_pieces<a, n>;

#define INSTANTIATE_ROWS(a, b, n)                                             \
  template [[host_name("lookup_backward_rows_" #a "_" #b "_" #n)]] [[kernel]] \
  decltype(lookup_backward_rows<a, b, n>) lookup_backward_rows<a, b, n>;

#define INSTANTIATE_GRAD(a, n)  \
  INSTANTIATE_PIECES(a, n)      \
  INSTANTIATE_ROWS(a, float, n) \
  INSTANTIATE_ROWS(a, half, n)  \
  INSTANTIATE_ROWS(a, bfloat, n)

#define INSTANTIATE_WIDTH(n) \
  INSTANTIATE_GRAD(float, n) \
  INSTANTIATE_GRAD(half, n)  \
  INSTANTIATE_GRAD(bfloat, n)

INSTANTIATE_WIDTH(1)
INSTANTIATE_WIDTH(4)

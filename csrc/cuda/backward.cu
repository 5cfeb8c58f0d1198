// grad_table[r, h] = sum of weights[t, k] * grad[t, h] over the entries (t, k) that read row r
//
// Which rows are read by how many tokens is not known on the host: an image's 2520 patches read 60
// + 42 rows, a language model's tokens nearly as many as they are. So all entries are sorted by
// row, and the sorted list is cut into tiles of equal size, wherever a row's run of entries begins
// or ends:
//
//   rows_kernel     finds each entry's row.
//   sort_kernel     sorts the entries by one digit of the row, stably; launched once a digit.
//   sum_kernel      sums each run within a tile. A run that lies within one is finished; one that
//                   crosses the border of tiles leaves a partial in each.
//   finish_kernel   adds up the partials of each such run.
//
// The first two also fill the table's gradient with zeros, a share a launch, on the multiprocessors
// that the sort leaves idle. Nobody reads or writes a share until all are filled, so a launch that
// overlaps with the one before it begins with its own at once, and the filling need not pause.
//
// A tile of the sums is kTile entries. It is cut into stretches of kStretch entries, one a team of
// kTeam lanes; what of a run lies in one stretch is a piece. A tile of the sort (sort_tile) is a
// multiple of kSortStep entries.
//
// Ten tokens, K = 1, four rows; in tiles of 4 entries, stretches of 2, and digits of 1 bit:
//
//   token              0 1 2 3  4 5 6 7  8 9
//   its row            2 0 2 2  0 2 3 2  x 2    8 is padding: x = 4, one past the last row
//   sorted by bit 0    0 1 2 3  4 5 7 8  9 6    tokens
//   then by bits 1, 2  1 4 0 2  3 5 7 9  6 8
//   their rows         0 0 2 2  2 2 2 2  3 x
//   sum, tile 0        row 0 is done: 1 + 4. Row 2 goes on, a tail partial: 0 + 2
//        tile 1        row 2 came from before and goes through, a head partial: (3 + 5) + (7 + 9)
//        tile 2        row 3 is done: 6. x is nobody's
//   finish, tile 0     row 2 begins here and goes on: its tail partial + tile 1's head partial
//   fill               row 1 stays zero
//
// Deterministic: a sum's order is that of the entries, grouped by their positions in the sorted
// list, which depend on nothing but the ids, the padding and the shapes. Integers alone are counted
// with atomics.
//
// A tile's blocks, one a slab of columns, run slab after slab, so that a token's gradient, which K
// entries read, comes from memory once and then from the level 2 cache: 128 bytes of each token and
// of those of the next slab, 25 MB for 100,000 tokens.
//
// Workspace, for E entries: 16 * E bytes for the list and its copy, two partials of H float32 each
// kTile entries, and 128 KiB for each digit: 6 MB for 40 images of 2520 patches and H = 768.

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common.cuh"

// Shared memory: what a launch asks for.
extern __shared__ uint4 dynamic_shared_memory[];

namespace embedding_lookup {
namespace {

template <typename T>
__device__ __forceinline__ T* shared_memory() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Nothing here is tuned. The sort: bits a digit, threads and entries a thread, and blocks, of which
// each reads what all have counted.
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSortThreads = 512;
constexpr int kSortWarps = kSortThreads / kWarpSize;
constexpr int kSortUnroll = 4;
constexpr int kSortStep = kSortThreads * kSortUnroll;
constexpr int kMaxSortBlocks = 128;
constexpr int kCountUnroll = 16;
constexpr int kFillUnroll = 8;

// The sum: threads a block, bytes of a token's gradient that a block takes, and entries a stretch.
constexpr int kSumThreads = 256;
constexpr int kSlabBytes = 128;
constexpr int kTeam = kSlabBytes / kVectorBytes;
constexpr int kTeams = kSumThreads / kTeam;
constexpr int kStretchBits = 4;
constexpr int kStretch = 1 << kStretchBits;
constexpr int kTile = kTeams * kStretch;
constexpr int kSumUnroll = 4;

constexpr int kFinishThreads = 256;
constexpr int kFinishWarps = kFinishThreads / kWarpSize;
constexpr int kFinishUnroll = 4;

struct alignas(8) Entry {
  uint32_t row;    // of all tables; Plan::no_row if it reads none
  uint32_t index;  // token * K + k
};

// The partials of a tile: of the run that came from the tile before, and of the run that begins
// here and goes on.
enum Side { kHead, kTail, kSides };

struct Plan {
  Lookup lookup;
  uint32_t num_entries;  // of all tokens
  uint32_t no_row;       // the number of rows
  uint32_t num_tiles;

  int num_digits;      // of a row
  int digit;           // that this launch sorts by
  int sort_tile_bits;  // a sort block's entries: 1 << sort_tile_bits
  uint32_t num_sort_tiles;

  const Entry* entries;  // [num_entries]
  Entry* sorted;         // [num_entries]
  uint32_t* counts;      // [num_digits, num_sort_tiles, kDigits]: each tile's entries with a digit
  float* partials;       // [num_tiles, kSides, num_columns]

  int64_t zero_bytes;  // of the table's gradient

  __device__ uint32_t digit_of(Entry entry, int digit) const {
    return entry.row >> (digit * kDigitBits) & (kDigits - 1);
  }
  __device__ uint32_t* counts_of(int digit, uint32_t sort_tile) const {
    return counts + (int64_t{digit} * num_sort_tiles + sort_tile) * kDigits;
  }
  // Of a place that the list doesn't have, one without a row; the last one's is read there: a
  // branch would be waited in.
  __device__ Entry entry_at(uint32_t position) const {
    Entry entry = entries[min(position, num_entries - 1)];
    if (position >= num_entries) entry.row = no_row;
    return entry;
  }
  __device__ uint32_t row_at(uint32_t position) const { return entry_at(position).row; }
  __device__ float* partial(uint32_t tile, Side side) const {
    return partials + (int64_t{tile} * kSides + side) * lookup.num_columns;
  }
};

// Share `digit` of 1 + num_digits: blocks past the sort's fill the table's gradient with zeros.
__device__ __forceinline__ void fill_share(const Plan& plan, int share) {
  const int64_t words = (plan.zero_bytes + kVectorBytes - 1) / kVectorBytes;
  const int64_t begin = words * share / (plan.num_digits + 1);
  const int64_t end = words * (share + 1) / (plan.num_digits + 1);
  auto* gradient = plan.lookup.table.data<char>();
  int64_t word = begin + int64_t{blockIdx.x - plan.num_sort_tiles} * kSortThreads * kFillUnroll;
  word += threadIdx.x;
#pragma unroll
  for (int u = 0; u < kFillUnroll; ++u, word += kSortThreads) {
    if (word >= end) return;
    char* address = gradient + word * kVectorBytes;
    if ((word + 1) * kVectorBytes <= plan.zero_bytes) {
      __stcs(reinterpret_cast<uint4*>(address), uint4{});
    } else {
      for (int64_t i = word * kVectorBytes; i < plan.zero_bytes; i += 2, address += 2) {
        *reinterpret_cast<uint16_t*>(address) = 0;
      }
    }
  }
}

// A block has a tile of the entries, a warp every kSortWarps-th 32 of them, a thread one of those.
// It also counts the tile's first digits, and clears the counts of the others.
__global__ void __launch_bounds__(kSortThreads, 2) rows_kernel(const Plan plan) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x >= plan.num_sort_tiles) return fill_share(plan, 0);
  auto* counts = shared_memory<uint32_t>();
  const Lookup& lookup = plan.lookup;
  const auto entries_per_token = static_cast<uint32_t>(lookup.num_entries);
  for (int digit = threadIdx.x; digit < kDigits; digit += kSortThreads) counts[digit] = 0;
  __syncthreads();

  const uint32_t begin = blockIdx.x << plan.sort_tile_bits;
  const uint32_t end = min(plan.num_entries, begin + (1u << plan.sort_tile_bits));
  for (uint32_t first = begin + threadIdx.x; first < end; first += kSortStep) {
    // The last one again where there are no more: a branch would be waited in. Offsets first: the
    // way to them is a loop.
    TokenOffsets offsets[kSortUnroll];
    uint32_t k[kSortUnroll];
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      const uint32_t i = min(first + u * kSortThreads, end - 1);
      offsets[u] = token_offsets(lookup, i / entries_per_token);
      k[u] = i % entries_per_token;
    }
    RawId ids[kSortUnroll];
    uint8_t paddings[kSortUnroll];
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      ids[u] = load_id(lookup, offsets[u], k[u]);
      paddings[u] = load_padding(lookup, offsets[u]);
    }
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      const uint32_t i = first + u * kSortThreads;
      if (i >= end) break;
      const int64_t row = resolve_row(lookup, ids[u], paddings[u]);
      Entry entry{plan.no_row, i};
      if (row != kNoRow) {
        entry.row = static_cast<uint32_t>(k[u] * lookup.rows_per_entry + row);
      }
      plan.sorted[i] = entry;
      atomicAdd(&counts[plan.digit_of(entry, 0)], 1u);
    }
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < kDigits; digit += kSortThreads) {
    plan.counts_of(0, blockIdx.x)[digit] = counts[digit];
    for (int other = 1; other < plan.num_digits; ++other) {
      plan.counts_of(other, blockIdx.x)[digit] = 0;
    }
  }
}

struct SortShared {
  uint32_t next[kDigits];       // where the tile's next entry with a digit goes
  uint32_t before[2][kDigits];  // entries with a digit in all tiles, [1] in those before this
  // Entries with a digit that a warp has met; then where its next goes.
  uint32_t warps[kSortWarps][kDigits];
};

// Where the tile's entries with each digit begin in the sorted list: after those with smaller
// digits and, of its own, those in the tiles before. A thread sums one digit, over half of the
// tiles.
__device__ __forceinline__ void find_places(const Plan& plan, SortShared& shared) {
  static_assert(kSortThreads == 2 * kDigits, "two threads a digit");
  const int digit = threadIdx.x % kDigits;
  const uint32_t half = threadIdx.x / kDigits;
  uint32_t total = 0;
  uint32_t before = 0;
  for (uint32_t first = half; first < plan.num_sort_tiles; first += 2 * kCountUnroll) {
    uint32_t counts[kCountUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kCountUnroll; ++u) {  // of the last tile again where there are no more
      const uint32_t sort_tile = min(first + 2 * u, plan.num_sort_tiles - 1);
      counts[u] = plan.counts_of(plan.digit, sort_tile)[digit];
    }
#pragma unroll
    for (uint32_t u = 0; u < kCountUnroll; ++u) {
      const uint32_t sort_tile = first + 2 * u;
      if (sort_tile < plan.num_sort_tiles) total += counts[u];
      if (sort_tile < blockIdx.x) before += counts[u];
    }
  }
  if (half == 1) {
    shared.before[0][digit] = total;
    shared.before[1][digit] = before;
  }
  __syncthreads();
  if (half == 0) {
    total += shared.before[0][digit];
    before += shared.before[1][digit];
    shared.before[0][digit] = total;
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) {  // a lane has kDigits / kWarpSize digits
    constexpr int kPerLane = kDigits / kWarpSize;
    uint32_t* totals = shared.before[0] + threadIdx.x * kPerLane;
    uint32_t sum = 0;
    for (int i = 0; i < kPerLane; ++i) sum += totals[i];
    uint32_t inclusive = sum;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, distance);
      if (static_cast<int>(threadIdx.x) >= distance) inclusive += other;
    }
    uint32_t first = inclusive - sum;
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t count = totals[i];
      totals[i] = first;
      first += count;
    }
  }
  __syncthreads();
  if (half == 0) shared.next[digit] = shared.before[0][digit] + before;
}

// A lane's entries of a step, or the last entry of the list again.
__device__ __forceinline__ void load_step(const Plan& plan, uint32_t first,
                                          Entry (&entries)[kSortUnroll]) {
#pragma unroll
  for (int u = 0; u < kSortUnroll; ++u) {
    entries[u] = plan.entries[min(first + u * kWarpSize, plan.num_entries - 1)];
  }
}

// A block has a tile of the entries, kSortStep of them at a time, of which a warp has kSortUnroll
// times 32 neighbours, and a lane every 32nd. A step's entries are requested before the places are
// found, or the step before them is done.
__global__ void __launch_bounds__(kSortThreads, 2) sort_kernel(const Plan plan) {
  if (blockIdx.x >= plan.num_sort_tiles) {
    let_next_kernel_start();
    fill_share(plan, plan.digit + 1);
    return wait_for_previous_kernel();  // or the next one wouldn't wait for that one
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  auto& shared = *shared_memory<SortShared>();
  const int lane = threadIdx.x % kWarpSize;
  uint32_t* warp_counts = shared.warps[threadIdx.x / kWarpSize];
  const uint32_t begin = blockIdx.x << plan.sort_tile_bits;
  const uint32_t end = min(plan.num_entries, begin + (1u << plan.sort_tile_bits));
  uint32_t first = begin + threadIdx.x / kWarpSize * (kWarpSize * kSortUnroll) + lane;
  Entry entries[kSortUnroll];
  load_step(plan, first, entries);
  find_places(plan, shared);

  for (uint32_t step = begin; step < end; step += kSortStep, first += kSortStep) {
    for (int digit = lane; digit < kDigits; digit += kWarpSize) warp_counts[digit] = 0;
    uint32_t rank[kSortUnroll];
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      const bool valid = first + u * kWarpSize < end;
      const uint32_t digit = valid ? plan.digit_of(entries[u], plan.digit) : kDigits;
      __syncwarp();
      const uint32_t met = valid ? warp_counts[digit] : 0;
      const unsigned same = __match_any_sync(kAllLanes, digit);
      __syncwarp();  // a match orders no memory
      rank[u] = met + __popc(same & ((1u << lane) - 1));
      if (valid && lane == __ffs(same) - 1) warp_counts[digit] = met + __popc(same);
    }
    __syncthreads();
    if (threadIdx.x < kDigits) {
      uint32_t next = shared.next[threadIdx.x];
      for (int warp = 0; warp < kSortWarps; ++warp) {
        const uint32_t count = shared.warps[warp][threadIdx.x];
        shared.warps[warp][threadIdx.x] = next;
        next += count;
      }
      shared.next[threadIdx.x] = next;
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      if (first + u * kWarpSize >= end) continue;
      const uint32_t place = warp_counts[plan.digit_of(entries[u], plan.digit)] + rank[u];
      plan.sorted[place] = entries[u];
      if (plan.digit + 1 == plan.num_digits) continue;
      uint32_t* counts = plan.counts_of(plan.digit + 1, place >> plan.sort_tile_bits);
      atomicAdd(&counts[plan.digit_of(entries[u], plan.digit + 1)], 1u);
    }
    if (step + kSortStep < end) load_step(plan, first + kSortStep, entries);
    __syncthreads();
  }
}

// What the teams of a block tell each other.
template <int kColumns>
struct SumShared {
  struct alignas(16) Item {
    int64_t offset;  // of the token's gradient
    float weight;
    uint32_t row;
  };
  // The tile's, its neighbours' before and after it, and one that is nobody's for each stretch, so
  // that the teams of a warp read from different banks.
  Item items[kTile + kTeams + 3];
  alignas(kVectorBytes) float partials[kTeams][kSides][kColumns];

  __device__ Item& item(int i) { return items[i + (i >> kStretchBits) + 2]; }
  __device__ uint32_t row(int i) { return item(i).row; }
};

// Returns whether any of them has a row. All entries are requested, then all weights.
template <typename Shared>
__device__ __forceinline__ bool load_tile(const Plan& plan, uint32_t tile, Shared& shared) {
  constexpr int kUnroll = kTile / kSumThreads;
  const auto entries_per_token = static_cast<uint32_t>(plan.lookup.num_entries);
  const uint32_t begin = tile * kTile;
  const int i = threadIdx.x;
  Entry entries[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) entries[u] = plan.entry_at(begin + i + u * kSumThreads);
  const bool is_before = i == 0;  // before the first there is none, nor at 2^32 - 1
  const uint32_t neighbour = plan.row_at(is_before ? begin - 1 : begin + kTile);
  if (plan.row_at(begin) == plan.no_row) return false;

  typename Shared::Item items[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const TokenOffsets offsets = token_offsets(plan.lookup, entries[u].index / entries_per_token);
    const uint32_t k = entries[u].index % entries_per_token;
    items[u] = {offsets.activation, read_weight(plan.lookup, offsets, k), entries[u].row};
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) shared.item(i + u * kSumThreads) = items[u];
  if (i < 2) shared.item(is_before ? -1 : kTile).row = neighbour;
  return true;
}

// A lane's columns of a row of the table's gradient.
template <typename Table, int N>
__device__ __forceinline__ void store_row(const Plan& plan, uint32_t row, int column,
                                          const float (&sums)[N]) {
  Table elements[N];
#pragma unroll
  for (int n = 0; n < N; ++n) elements[n] = static_cast<Table>(sums[n]);
  Vector<Table, N> vector;
  vector.pack(elements);
  auto* gradient = plan.lookup.table.data<Table>();
  store_streaming<N>(gradient + int64_t{row} * plan.lookup.num_columns + column, vector);
}

// Sums the pieces of a team's stretch, a lane N columns of them. A run that begins and ends here is
// finished; the partials of one that came from before, and of one that goes on, are left in shared
// memory.
template <typename Grad, typename Table, int N, typename Shared>
__device__ __forceinline__ void sum_stretch(const Plan& plan, Shared& shared, int team, int lane,
                                            int column) {
  const TokenOperand& activation = plan.lookup.activation;
  const Grad* grad = activation.data<const Grad>() + column * (N == 1 ? activation.last_stride : 1);
  const int first = team * kStretch;
  bool from_before = shared.row(first - 1) == shared.row(first);
  float sums[N] = {};
  for (int begin = first; begin < first + kStretch; begin += kSumUnroll) {
    const auto* items = &shared.item(begin);
    if (items[0].row == plan.no_row) return;
    Vector<Grad, N> vectors[kSumUnroll];
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {  // an entry without a row has a token all the same
      vectors[u] = load<N, Cache::kKeep>(grad + items[u].offset);
    }
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const uint32_t row = items[u].row;
      float elements[N];
      to_floats(vectors[u], elements);
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] = fmaf(items[u].weight, elements[n], sums[n]);
      const int next = begin + u + 1;
      const bool goes_on = (u + 1 < kSumUnroll ? items[u + 1].row : shared.row(next)) == row;
      if (goes_on && next < first + kStretch) continue;
      if (from_before || goes_on) {
        store_sums(shared.partials[team][from_before ? kHead : kTail] + lane * N, sums);
      } else if (row != plan.no_row) {
        store_row<Table>(plan, row, column, sums);
      }
      from_before = false;
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] = 0.0f;
    }
  }
}

// Adds up the pieces of a run that begins in a team's stretch and goes on, or, with kHead, that
// came from the tile before and is the first of team 0.
template <typename Table, int N, typename Shared>
__device__ __forceinline__ void join_pieces(const Plan& plan, uint32_t tile, Shared& shared,
                                            Side side, int team, int lane, int column) {
  const uint32_t row = shared.row(side == kHead ? 0 : team * kStretch + kStretch - 1);
  float sums[N];
  load_sums(shared.partials[team][side] + lane * N, sums);
  int next = team + 1;
  const bool leaves = shared.row(next * kStretch - 1) == row;
  for (; leaves && next < kTeams && shared.row(next * kStretch) == row; ++next) {
    float others[N];
    load_sums(shared.partials[next][kHead] + lane * N, others);
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += others[n];
  }
  const bool goes_on = shared.row(next * kStretch - 1) == row && shared.row(next * kStretch) == row;
  if (side == kHead || goes_on) {
    store_sums(plan.partial(tile, side) + column, sums);
  } else {
    store_row<Table>(plan, row, column, sums);
  }
}

// A block has a tile of the sorted entries and a slab of the columns, a warp four stretches of the
// tile, a team of kTeam lanes one, a lane N columns.
template <typename Grad, typename Table, int N>
__global__ void __launch_bounds__(kSumThreads, 4) sum_kernel(const Plan plan) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  auto& shared = *shared_memory<SumShared<kTeam * N>>();
  const uint32_t tile = blockIdx.x % plan.num_tiles;
  const uint32_t slab = blockIdx.x / plan.num_tiles;
  const int team = threadIdx.x / kTeam;
  const int lane = threadIdx.x % kTeam;
  const auto column = static_cast<int>(slab * kTeam * N) + lane * N;
  const bool has_column = column < plan.lookup.num_columns;
  if (!load_tile(plan, tile, shared)) return;
  __syncthreads();
  if (has_column) sum_stretch<Grad, Table, N>(plan, shared, team, lane, column);
  __syncthreads();
  if (!has_column) return;

  const int first = team * kStretch;
  const int last = first + kStretch - 1;
  const auto came = [&](int i) { return shared.row(i - 1) == shared.row(i); };
  if (team == 0 && came(0)) {
    join_pieces<Table, N>(plan, tile, shared, kHead, team, lane, column);
  }
  const bool whole_came = came(first) && shared.row(first) == shared.row(last);
  if (came(last + 1) && !whole_came && shared.row(last) != plan.no_row) {
    join_pieces<Table, N>(plan, tile, shared, kTail, team, lane, column);
  }
}

struct FinishShared {
  uint32_t votes[kFinishWarps];
  float sums[kFinishWarps][kWarpSize * 4];
};

// The number of tiles after `tile` that begin with `row`.
__device__ __forceinline__ uint32_t count_tiles(const Plan& plan, uint32_t tile, uint32_t row,
                                                FinishShared& shared) {
  uint32_t count = 0;
  for (uint32_t first = tile + 1;; first += kFinishThreads) {
    const uint32_t other = first + threadIdx.x;
    const bool same = other < plan.num_tiles && plan.row_at(other * kTile) == row;
    const unsigned lanes = __ballot_sync(kAllLanes, same);
    if (threadIdx.x % kWarpSize == 0) shared.votes[threadIdx.x / kWarpSize] = __popc(lanes);
    __syncthreads();
    uint32_t votes = 0;
    for (int warp = 0; warp < kFinishWarps; ++warp) votes += shared.votes[warp];
    __syncthreads();
    count += votes;
    if (votes < kFinishThreads) return count;
  }
}

// A block has the run that begins in a tile and goes on, if one does, and 32 * N columns; a warp a
// part of the run's partials, a lane N columns. The first warp adds up what the warps have.
template <typename Table, int N>
__global__ void __launch_bounds__(kFinishThreads, 4) finish_kernel(const Plan plan) {
  wait_for_previous_kernel();  // the last: what follows is others'
  auto& shared = *shared_memory<FinishShared>();
  const uint32_t tile = blockIdx.x % plan.num_tiles;
  const uint32_t begin = tile * kTile;
  const uint32_t before =
      plan.row_at(begin - 1);  // before the first there is none, nor at 2^32 - 1
  const uint32_t first = plan.row_at(begin);
  const uint32_t row = plan.row_at(begin + kTile - 1);
  const uint32_t after = plan.row_at(begin + kTile);
  const bool goes_on = after == row && row != plan.no_row;
  const bool begins = before != row || first != row;
  if (!goes_on || !begins) return;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const auto column = static_cast<int>(blockIdx.x / plan.num_tiles * (kWarpSize * N)) + lane * N;
  const bool has_column = column < plan.lookup.num_columns;
  const uint32_t num_partials = 1 + count_tiles(plan, tile, row, shared);
  const uint32_t per_warp = (num_partials + kFinishWarps - 1) / kFinishWarps;
  const uint32_t last = min(num_partials, (warp + 1) * per_warp);
  float sums[N] = {};
  for (uint32_t i = warp * per_warp; i < last && has_column; i += kFinishUnroll) {
    float partials[kFinishUnroll][N];
#pragma unroll
    for (int u = 0; u < kFinishUnroll; ++u) {
      const uint32_t other = min(i + u, last - 1);
      load_sums(plan.partial(tile + other, other == 0 ? kTail : kHead) + column, partials[u]);
    }
#pragma unroll
    for (int u = 0; u < kFinishUnroll; ++u) {
      for (int n = 0; n < N; ++n) sums[n] += i + u < last ? partials[u][n] : 0.0f;
    }
  }
  store_sums(shared.sums[warp] + lane * N, sums);
  __syncthreads();
  if (warp > 0 || !has_column) return;
  for (int other = 1; other < kFinishWarps; ++other) {
    float others[N];
    load_sums(shared.sums[other] + lane * N, others);
    for (int n = 0; n < N; ++n) sums[n] += others[n];
  }
  store_row<Table>(plan, row, column, sums);
}

// Hands out the parts of one allocation.
class Workspace {
 public:
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t offset = size_;
    size_ +=
        (count * static_cast<int64_t>(sizeof(T)) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    return offset;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// How the work is cut up.
Plan make_plan(const Lookup& lookup) {
  Plan plan{};
  plan.lookup = lookup;
  plan.num_entries = static_cast<uint32_t>(lookup.num_tokens * lookup.num_entries);
  plan.no_row = static_cast<uint32_t>(lookup.total_rows());
  plan.num_tiles = (plan.num_entries + kTile - 1) / kTile;
  const auto num_sort_tiles = [&] {
    return static_cast<uint32_t>(
        (int64_t{plan.num_entries} + (int64_t{1} << plan.sort_tile_bits) - 1) >>
        plan.sort_tile_bits);
  };
  for (plan.sort_tile_bits = 11; num_sort_tiles() > kMaxSortBlocks;) ++plan.sort_tile_bits;
  static_assert(kSortStep == 1 << 11, "the smallest tile is one step");
  plan.num_sort_tiles = num_sort_tiles();
  plan.zero_bytes = plan.no_row * lookup.num_columns * element_size(lookup.table.dtype);
  if (plan.num_entries == 0) return plan;
  do {
    ++plan.num_digits;
  } while (int64_t{plan.no_row} >> (plan.num_digits * kDigitBits) != 0);
  return plan;
}

template <typename Grad, typename Table>
void launch_sums(const Plan& plan, bool vectorise, Follow follow, cudaStream_t stream) {
  constexpr int N = kVectorBytes / sizeof(Grad);
  constexpr int64_t kSharedBytes = sizeof(SumShared<kTeam * N>) + 1024;  // of these CUDA takes 1024
  static_assert(4 * kSharedBytes <= 164 << 10, "four blocks on 8.0, 9.0 and 10.0");
  static_assert(3 * kSharedBytes <= 100 << 10, "three blocks on 8.6, 8.9 and 12.0");
  static_assert(2 * kSharedBytes <= 64 << 10, "two blocks on 7.5");
  const auto divide_up = [&](int64_t columns) {
    return (plan.lookup.num_columns + columns - 1) / columns;
  };
  const int n = vectorise ? N : 1;
  launch("the backward's sums", vectorise ? sum_kernel<Grad, Table, N> : sum_kernel<Grad, Table, 1>,
         plan.num_tiles * divide_up(kTeam * n), kSumThreads,
         vectorise ? sizeof(SumShared<kTeam * N>) : sizeof(SumShared<kTeam>), stream, plan, follow);
  const bool by_four = plan.lookup.num_columns % 4 == 0;
  launch("the backward's last step", by_four ? finish_kernel<Table, 4> : finish_kernel<Table, 1>,
         plan.num_tiles * divide_up(kWarpSize * (by_four ? 4 : 1)), kFinishThreads,
         sizeof(FinishShared), stream, plan, follow);
}

}  // namespace

void launch_backward(const Lookup& lookup, torch::stable::Device device) {
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  const cudaStream_t stream = current_stream(device);
  check_counts(lookup);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  check(lookup.num_tokens * lookup.num_entries <= kMax, "position_ids must have at most ", kMax,
        " ids for the backward on CUDA, got ", lookup.num_tokens, " tokens of ",
        lookup.num_entries);
  check(lookup.total_rows() < kMax, "table of shape [", lookup.total_rows() / lookup.num_rows, ", ",
        lookup.num_rows, ", ", lookup.num_columns, "] is too large for the backward on CUDA");
  Plan plan = make_plan(lookup);
  const int64_t share = plan.zero_bytes / kVectorBytes / (plan.num_digits + 1) + 1;
  const int64_t blocks = plan.num_sort_tiles + share / (kSortThreads * kFillUnroll) + 1;
  const auto launch_rows = [&] {
    launch("the backward's rows", rows_kernel, blocks, kSortThreads, kDigits * sizeof(uint32_t),
           stream, plan);
  };
  if (plan.num_entries == 0) return launch_rows();

  Workspace workspace;
  const int64_t lists[] = {workspace.add<Entry>(plan.num_entries),
                           workspace.add<Entry>(plan.num_entries)};
  const int64_t counts =
      workspace.add<uint32_t>(int64_t{plan.num_digits} * plan.num_sort_tiles * kDigits);
  const int64_t partials =
      workspace.add<float>(int64_t{plan.num_tiles} * kSides * lookup.num_columns);
  Tensor memory =
      allocate("the backward's workspace", {workspace.size()}, ScalarType::Byte, device);
  auto* base = static_cast<char*>(memory.mutable_data_ptr());
  Entry* list[] = {reinterpret_cast<Entry*>(base + lists[0]),
                   reinterpret_cast<Entry*>(base + lists[1])};
  plan.counts = reinterpret_cast<uint32_t*>(base + counts);
  plan.partials = reinterpret_cast<float*>(base + partials);

  const Follow follow = can_overlap(sort_kernel, device) ? Follow::kOverlapping : Follow::kWhenDone;
  plan.sorted = list[0];
  launch_rows();
  for (plan.digit = 0; plan.digit < plan.num_digits; ++plan.digit) {
    plan.entries = list[plan.digit % 2];
    plan.sorted = list[(plan.digit + 1) % 2];
    launch("the backward's sort", sort_kernel, blocks, kSortThreads, sizeof(SortShared), stream,
           plan, follow);
  }
  plan.entries = plan.sorted;
  dispatch(lookup.activation.dtype, [&](auto grad_type) {
    dispatch(lookup.table.dtype, [&](auto table_type) {
      using Grad = typename decltype(grad_type)::type;
      constexpr int N = kVectorBytes / sizeof(Grad);
      const bool vectorise =
          lookup.num_columns % N == 0 && can_vectorise_activation(lookup, sizeof(Grad), N);
      launch_sums<Grad, typename decltype(table_type)::type>(plan, vectorise, follow, stream);
    });
  });
}

}  // namespace embedding_lookup

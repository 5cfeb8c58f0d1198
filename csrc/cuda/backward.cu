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
// that the sort leaves idle.
//
// Ten tokens, K = 1, four rows; in tiles of 4 entries, pieces of 2, and digits of 1 bit:
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
constexpr int kSortTile = kSortThreads * kSortUnroll;
constexpr int kMaxSortBlocks = 128;
constexpr int kFillUnroll = 8;

// The sum: threads a block, bytes of a token's gradient that a block takes, and entries a piece.
constexpr int kSumThreads = 256;
constexpr int kSlabBytes = 128;
constexpr int kTeam = kSlabBytes / kVectorBytes;
constexpr int kTeams = kSumThreads / kTeam;
constexpr int kPiece = 16;
constexpr int kTile = kTeams * kPiece;
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

  int num_digits;  // of a row
  int digit;       // that this launch sorts by
  int chunk_bits;  // a sort block's entries: 1 << chunk_bits
  uint32_t num_chunks;

  const Entry* entries;  // [num_entries]
  Entry* sorted;         // [num_entries]
  uint32_t* counts;      // [num_digits, num_chunks, kDigits]: each chunk's entries with a digit
  float* partials;       // [num_tiles, kSides, num_columns]

  int64_t zero_bytes;  // of the table's gradient

  __device__ uint32_t digit_of(Entry entry, int digit) const {
    return entry.row >> (digit * kDigitBits) & (kDigits - 1);
  }
  __device__ uint32_t* counts_of(int digit, uint32_t chunk) const {
    return counts + (int64_t{digit} * num_chunks + chunk) * kDigits;
  }
  __device__ uint32_t row_at(uint32_t position) const {
    return position < num_entries ? entries[position].row : no_row;
  }
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
  int64_t word = begin + int64_t{blockIdx.x - plan.num_chunks} * kSortThreads * kFillUnroll;
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

// A block has a chunk of the entries, a thread every kSortThreads-th of them. It also counts the
// chunk's first digits, and clears the counts of the others.
__global__ void __launch_bounds__(kSortThreads) rows_kernel(const Plan plan) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x >= plan.num_chunks) return fill_share(plan, 0);
  auto* counts = shared_memory<uint32_t>();
  const Lookup& lookup = plan.lookup;
  const auto entries_per_token = static_cast<uint32_t>(lookup.num_entries);
  for (int digit = threadIdx.x; digit < kDigits; digit += kSortThreads) counts[digit] = 0;
  __syncthreads();

  const uint32_t begin = blockIdx.x << plan.chunk_bits;
  const uint32_t end = min(plan.num_entries, begin + (1u << plan.chunk_bits));
#pragma unroll 4
  for (uint32_t i = begin + threadIdx.x; i < end; i += kSortThreads) {
    const uint32_t k = i % entries_per_token;
    const TokenOffsets offsets = token_offsets(lookup, i / entries_per_token);
    const RawId id = load_id(lookup, offsets, k);
    const int64_t row = resolve_row(lookup, id, is_padding(lookup, offsets));
    Entry entry{plan.no_row, i};
    if (row != kNoRow) entry.row = static_cast<uint32_t>(k * lookup.rows_per_entry + row);
    plan.sorted[i] = entry;
    atomicAdd(&counts[plan.digit_of(entry, 0)], 1u);
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
  uint32_t next[kDigits];       // where the chunk's next entry with a digit goes
  uint32_t before[2][kDigits];  // entries with a digit in all chunks, [1] in those before this
  // Entries with a digit that a warp has met; then where its next goes.
  uint32_t warps[kSortWarps][kDigits];
};

// Where the chunk's entries with each digit begin in the sorted list: after those with smaller
// digits and, of its own, those in the chunks before. A thread sums one digit, over half of the
// chunks.
__device__ __forceinline__ void find_places(const Plan& plan, SortShared& shared) {
  static_assert(kSortThreads == 2 * kDigits, "two threads a digit");
  const int digit = threadIdx.x % kDigits;
  const uint32_t half = threadIdx.x / kDigits;
  uint32_t total = 0;
  uint32_t before = 0;
#pragma unroll 16
  for (uint32_t chunk = half; chunk < plan.num_chunks; chunk += 2) {
    const uint32_t count = plan.counts_of(plan.digit, chunk)[digit];
    total += count;
    if (chunk < blockIdx.x) before += count;
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

// A block has a chunk of the entries, kSortTile of them at a time, of which a warp has kSortUnroll
// times 32 neighbours, and a lane every 32nd.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const Plan plan) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x >= plan.num_chunks) return fill_share(plan, plan.digit + 1);
  auto& shared = *shared_memory<SortShared>();
  const int lane = threadIdx.x % kWarpSize;
  uint32_t* warp_counts = shared.warps[threadIdx.x / kWarpSize];
  find_places(plan, shared);

  const uint32_t begin = blockIdx.x << plan.chunk_bits;
  const uint32_t end = min(plan.num_entries, begin + (1u << plan.chunk_bits));
  for (uint32_t tile = begin; tile < end; tile += kSortTile) {
    for (int digit = lane; digit < kDigits; digit += kWarpSize) warp_counts[digit] = 0;
    const uint32_t first = tile + threadIdx.x / kWarpSize * (kWarpSize * kSortUnroll) + lane;
    Entry entries[kSortUnroll];
    uint32_t rank[kSortUnroll];
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      const uint32_t i = first + u * kWarpSize;
      if (i < end) entries[u] = plan.entries[i];
    }
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
      uint32_t* counts = plan.counts_of(plan.digit + 1, place >> plan.chunk_bits);
      atomicAdd(&counts[plan.digit_of(entries[u], plan.digit + 1)], 1u);
    }
    __syncthreads();
  }
}

// What the teams of a block tell each other.
template <int kColumns>
struct SumShared {
  struct Item {
    int64_t offset;  // of the token's gradient
    float weight;
  };
  Item items[kTile];
  uint32_t
      rows[kTile + 2];  // of the tile's entries from [1] on; before, and after, its neighbours'
  alignas(kVectorBytes) float pieces[kTeams][kSides][kColumns];

  __device__ uint32_t row(int i) const { return rows[i + 1]; }
};

template <typename Shared>
__device__ __forceinline__ void load_tile(const Plan& plan, uint32_t tile, Shared& shared) {
  const auto entries_per_token = static_cast<uint32_t>(plan.lookup.num_entries);
  const uint32_t begin = tile * kTile;
  if (threadIdx.x == 0) shared.rows[0] = tile == 0 ? plan.no_row : plan.row_at(begin - 1);
  if (threadIdx.x == 1) shared.rows[kTile + 1] = plan.row_at(begin + kTile);
  for (uint32_t i = threadIdx.x; i < kTile; i += kSumThreads) {
    typename Shared::Item item{0, 0.0f};
    uint32_t row = plan.no_row;
    if (begin + i < plan.num_entries) {
      const Entry entry = plan.entries[begin + i];
      row = entry.row;
      const TokenOffsets offsets = token_offsets(plan.lookup, entry.index / entries_per_token);
      item.offset = offsets.activation;
      item.weight = read_weight(plan.lookup, offsets, entry.index % entries_per_token);
    }
    shared.items[i] = item;
    shared.rows[i + 1] = row;
  }
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

// Sums the runs of a team's piece, a lane N columns of them. A run that begins and ends in the
// piece is finished; one that came from before, and one that goes on, are left in shared memory.
template <typename Grad, typename Table, int N, typename Shared>
__device__ __forceinline__ void sum_piece(const Plan& plan, Shared& shared, int team, int lane,
                                          int column) {
  const TokenOperand& activation = plan.lookup.activation;
  const Grad* grad = activation.data<const Grad>() + column * (N == 1 ? activation.last_stride : 1);
  const int first = team * kPiece;
  bool from_before = shared.row(first - 1) == shared.row(first);
  float sums[N] = {};
  for (int begin = first; begin < first + kPiece; begin += kSumUnroll) {
    if (shared.row(begin) == plan.no_row) return;
    Vector<Grad, N> vectors[kSumUnroll];
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {  // an entry without a row has an offset of 0
      vectors[u] = load<N, Cache::kKeep>(grad + shared.items[begin + u].offset);
    }
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const int i = begin + u;
      Grad elements[N];
      vectors[u].unpack(elements);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sums[n] = fmaf(shared.items[i].weight, static_cast<float>(elements[n]), sums[n]);
      }
      const bool goes_on = shared.row(i + 1) == shared.row(i);
      if (goes_on && i + 1 < first + kPiece) continue;
      if (from_before || goes_on) {
        store_sums(shared.pieces[team][from_before ? kHead : kTail] + lane * N, sums);
      } else if (shared.row(i) != plan.no_row) {
        store_row<Table>(plan, shared.row(i), column, sums);
      }
      from_before = false;
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] = 0.0f;
    }
  }
}

// Adds up a run that begins in a team's piece and goes on, or, with kHead, that came from the tile
// before and is the first of team 0.
template <typename Table, int N, typename Shared>
__device__ __forceinline__ void join_pieces(const Plan& plan, uint32_t tile, Shared& shared,
                                            Side side, int team, int lane, int column) {
  const uint32_t row = shared.row(side == kHead ? 0 : team * kPiece + kPiece - 1);
  float sums[N];
  load_sums(shared.pieces[team][side] + lane * N, sums);
  int next = team + 1;
  const bool leaves = shared.row(next * kPiece - 1) == row;
  for (; leaves && next < kTeams && shared.row(next * kPiece) == row; ++next) {
    float others[N];
    load_sums(shared.pieces[next][kHead] + lane * N, others);
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += others[n];
  }
  const bool goes_on = shared.row(next * kPiece - 1) == row && shared.row(next * kPiece) == row;
  if (side == kHead || goes_on) {
    store_sums(plan.partial(tile, side) + column, sums);
  } else {
    store_row<Table>(plan, row, column, sums);
  }
}

// A block has a tile of the sorted entries and a slab of the columns, a team of kTeam lanes a piece
// of the tile, a lane N columns.
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
  if (plan.row_at(tile * kTile) == plan.no_row) return;

  load_tile(plan, tile, shared);
  __syncthreads();
  if (has_column) sum_piece<Grad, Table, N>(plan, shared, team, lane, column);
  __syncthreads();
  if (!has_column) return;

  const int first = team * kPiece;
  const int last = first + kPiece - 1;
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
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Plan plan) {
  wait_for_previous_kernel();  // the last: what follows is others'
  auto& shared = *shared_memory<FinishShared>();
  const uint32_t tile = blockIdx.x % plan.num_tiles;
  const uint32_t begin = tile * kTile;
  const uint32_t row = plan.row_at(begin + kTile - 1);
  const bool goes_on = row != plan.no_row && plan.row_at(begin + kTile) == row;
  const bool begins = tile == 0 || plan.row_at(begin) != row || plan.row_at(begin - 1) != row;
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
  const auto num_chunks = [&] {
    return static_cast<uint32_t>(
        (int64_t{plan.num_entries} + (int64_t{1} << plan.chunk_bits) - 1) >> plan.chunk_bits);
  };
  for (plan.chunk_bits = 11; num_chunks() > kMaxSortBlocks;) ++plan.chunk_bits;
  static_assert(kSortTile == 1 << 11, "the smallest chunk is one tile");
  plan.num_chunks = num_chunks();
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
  static_assert(2 * (sizeof(SumShared<kTeam * N>) + 1024) <= 64 << 10, "two blocks, on 7.5 too");
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
  const int64_t blocks = plan.num_chunks + share / (kSortThreads * kFillUnroll) + 1;
  const auto launch_rows = [&] {
    launch("the backward's rows", rows_kernel, blocks, kSortThreads, kDigits * sizeof(uint32_t),
           stream, plan);
  };
  if (plan.num_entries == 0) return launch_rows();

  Workspace workspace;
  const int64_t lists[] = {workspace.add<Entry>(plan.num_entries),
                           workspace.add<Entry>(plan.num_entries)};
  const int64_t counts =
      workspace.add<uint32_t>(int64_t{plan.num_digits} * plan.num_chunks * kDigits);
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

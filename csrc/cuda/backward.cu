// grad_table[k, r, h] = sum of grad[t, h] over the unpadded tokens t whose max(ids[t, k], 0) is r
//
// Few rows are read by many tokens (an image's 2520 patches read 60 + 42 rows), or many by few, and
// which is not known on the host. So the tokens are cut into tiles of kTile:
//
//   sort_kernel     sorts the tokens by the row they read, for each axis. The positions of one
//                   row in that order are a segment.
//   partial_kernel  brings the tile's gradients into shared memory, 64 bytes of each token a
//                   block, and sums every segment of kMinRun tokens or more, for all axes. This
//                   is where the gradient is read from memory, once.
//   finish_kernel   adds up each row over the tiles, from the partial sums of its segments or,
//                   where a segment is short, from its few gradients themselves, and rounds. The
//                   other rows it fills with zeros.
//
// Deterministic: a sum's order is that of the tiles, and within a tile that of the tokens, whatever
// runs first. Two lists, of the runs to sum and of the rows in use, are in the order in which
// blocks happened to append to them; they say what is left to do, and no sum depends on their
// order.
//
// Memory traffic, with G the bytes of the gradient, D those of the table's gradient and R the rows
// that a tile reads: G + D, and through the level 2 cache 2 * R / kTile * H * 4 bytes a token for
// the partial sums. With segments too short for partial sums it is K * G + D, each token's row
// being read where it is needed.
//
// Workspace, for T tokens: K * T / kMinRun partial sums of H float32 (T * H bytes for K = 2, half
// of a 16-bit gradient, of which the grid of an image writes a third), 2 * K * P bytes a tile for
// the segments' places, 5 bytes a token and axis for the order and the runs.

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common.cuh"

// Shared memory: what a launch asks for, kSortBytes, kStageBytes or kFinishBytes.
extern __shared__ uint4 dynamic_shared_memory[];

namespace embedding_lookup {
namespace {

// Tokens a tile, and in bits.
constexpr int kTileBits = 10;
constexpr int kTile = 1 << kTileBits;

// Tokens from which a segment is summed as a whole: a partial sum is written and read, 8 bytes a
// column, where each of the tokens would be 2 or 4.
constexpr int kMinRun = 8;

// A segment of more tokens is summed in several runs, so that no thread works alone for long.
constexpr int kMaxRun = 128;

// Room for the runs of a tile on one axis. A run's number is its first position / kMinRun.
constexpr int kTileRuns = kTile / kMinRun;
static_assert(kMaxRun >= 2 * kMinRun, "runs of a divided segment are kMinRun long or more");

constexpr int kSortThreads = kTile / 2;
constexpr int kSortBytes = kTile * sizeof(uint64_t);

// Bytes of each token's gradient that a block of the partial kernel takes, and the threads that
// share a token. The tile fills the 64 KiB of shared memory that every architecture has.
constexpr int kTokenBytes = 64;
constexpr int kTokenLanes = kTokenBytes / kVectorBytes;
constexpr int kPartialThreads = 256;
constexpr int kStageBytes = kTile * kTokenBytes;

constexpr int kFinishWarps = 4;
constexpr int kFinishBytes = kFinishWarps * kWarpSize * kVectorBytes * 2;
constexpr int kFinishBlocks = 2048;

struct Plan {
  Backward params;
  int64_t num_tiles;
  int64_t table_rows;  // K * P; row r of axis k is number k * P + r
  int64_t pitch;       // columns of a partial sum, a multiple of a block's

  // Zeros before the first kernel.
  uint16_t* segments;  // [K * P, num_tiles] position of the row's segment in the tile's order, + 1
  uint32_t* row_used;  // [K * P] 1 if any token reads the row
  uint32_t* num_used_rows;  // [1]
  uint32_t* num_runs;       // [num_tiles, K]

  uint32_t* used_rows;  // [K * P] numbers of the rows in use
  uint32_t* order;  // [num_tiles, K, kTile] token in the tile; a segment's first: | length << 16
  uint32_t* runs;   // [num_tiles, K, kTileRuns] first position in the order | length << 16
  float* partials;  // [num_tiles, K, kTileRuns, pitch]
};

// A segment's runs, equally long.
__device__ __forceinline__ int num_runs_of(int length) {
  return length < kMinRun ? 0 : (length + kMaxRun - 1) / kMaxRun;
}
__device__ __forceinline__ int run_begin(int position, int length, int run) {
  return position + length * run / num_runs_of(length);
}

// One block per tile and axis.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const Plan plan) {
  // The row, then the token in the tile: all different, so that there is one sorted order.
  constexpr uint64_t kNoKey = ~uint64_t{0};
  auto* keys = reinterpret_cast<uint64_t*>(dynamic_shared_memory);
  const Lookup& lookup = plan.params.lookup;
  const auto num_axes = static_cast<uint32_t>(lookup.num_axes);
  const uint32_t tile = blockIdx.x / num_axes;
  const uint32_t axis = blockIdx.x % num_axes;

  for (int i = threadIdx.x; i < kTile; i += kSortThreads) {
    const uint32_t token = tile * kTile + i;
    keys[i] = kNoKey;
    if (token < lookup.num_tokens) {
      const TokenOffsets offsets = token_offsets(lookup, token);
      const int64_t row = load_row(lookup, offsets, axis);
      if (row != kNoRow && !is_padding(lookup, offsets)) {
        keys[i] = static_cast<uint64_t>(row) << kTileBits | i;
      }
    }
  }

  // Bitonic sort, a pair of keys per thread.
  for (int size = 2; size <= kTile; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      const int offset = threadIdx.x & (stride - 1);
      const int low = (threadIdx.x - offset) * 2 + offset;
      const bool ascending = (low & size) == 0;
      const uint64_t a = keys[low];
      const uint64_t b = keys[low + stride];
      if ((a > b) == ascending) {
        keys[low] = b;
        keys[low + stride] = a;
      }
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kTile; i += kSortThreads) {
    const uint64_t key = keys[i];
    if (key == kNoKey) break;
    const int64_t row = static_cast<int64_t>(key >> kTileBits);
    uint32_t entry = key & (kTile - 1);
    if (i == 0 || static_cast<int64_t>(keys[i - 1] >> kTileBits) != row) {
      // The first of a segment. Its end: the first key past the row's largest possible.
      int end = i + 1;
      for (int last = kTile; end < last;) {
        const int middle = (end + last) / 2;
        if (keys[middle] <= (key | (kTile - 1))) {
          end = middle + 1;
        } else {
          last = middle;
        }
      }
      const int length = end - i;
      entry |= length << 16;

      const int64_t table_row = axis * lookup.num_rows + row;
      plan.segments[table_row * plan.num_tiles + tile] = static_cast<uint16_t>(i + 1);
      if (atomicExch(&plan.row_used[table_row], 1u) == 0) {
        plan.used_rows[atomicAdd(plan.num_used_rows, 1u)] = static_cast<uint32_t>(table_row);
      }
      const int num_runs = num_runs_of(length);
      if (num_runs > 0) {
        uint32_t* runs = plan.runs + blockIdx.x * int64_t{kTileRuns};
        const uint32_t first = atomicAdd(&plan.num_runs[blockIdx.x], num_runs);
        for (int run = 0; run < num_runs; ++run) {
          const int begin = run_begin(i, length, run);
          runs[first + run] = begin | (run_begin(i, length, run + 1) - begin) << 16;
        }
      }
    }
    plan.order[blockIdx.x * int64_t{kTile} + i] = entry;
  }
}

// One block per tile and kTokenBytes of columns. In the second half, kTokenLanes threads sum a run.
template <typename Grad, bool kVectorised>
__global__ void __launch_bounds__(kPartialThreads) partial_kernel(const Plan plan) {
  constexpr int N = kVectorBytes / sizeof(Grad);
  constexpr int kColumns = kTokenLanes * N;
  constexpr int kUnroll = 4;
  const Lookup& lookup = plan.params.lookup;
  const auto num_slabs = static_cast<uint32_t>(plan.pitch / kColumns);
  const uint32_t tile = blockIdx.x / num_slabs;
  const int64_t first_column = int64_t{blockIdx.x % num_slabs} * kColumns;
  const uint32_t* num_runs = plan.num_runs + tile * lookup.num_axes;

  uint32_t any_runs = 0;
  for (int axis = 0; axis < lookup.num_axes; ++axis) any_runs |= num_runs[axis];
  if (any_runs == 0) return;

  const auto* grad = static_cast<const Grad*>(plan.params.grad);
  const uint32_t first_token = tile * kTile;
  const int num_tokens =
      static_cast<int>(min(int64_t{kTile}, lookup.num_tokens - int64_t{first_token}));
  if (kVectorised) {
    constexpr int kTokensAtOnce = kPartialThreads / kTokenLanes;
    const int64_t column = first_column + threadIdx.x % kTokenLanes * N;
    if (column < lookup.hidden) {
      for (int first = threadIdx.x / kTokenLanes; first < num_tokens;
           first += kUnroll * kTokensAtOnce) {
        Vector<Grad, N> vectors[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int token = first + u * kTokensAtOnce;
          if (token < num_tokens) {
            vectors[u] = load<N, Cache::kStream>(
                grad + token_offsets(lookup, first_token + token).rows + column);
          }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int token = first + u * kTokensAtOnce;
          if (token < num_tokens) {
            dynamic_shared_memory[token * kTokenLanes + threadIdx.x % kTokenLanes] =
                vectors[u].word(0);
          }
        }
      }
    }
  } else {
    auto* stage = reinterpret_cast<Grad*>(dynamic_shared_memory);
    for (int i = threadIdx.x; i < num_tokens * kColumns; i += kPartialThreads) {
      const int64_t column = first_column + i % kColumns;
      stage[i] = Grad(0.0f);
      if (column < lookup.hidden) {
        stage[i] = grad[token_offsets(lookup, first_token + i / kColumns).rows +
                        column * plan.params.grad_hidden_stride];
      }
    }
  }
  __syncthreads();

  const int lane = threadIdx.x % kTokenLanes;
  const int64_t column = first_column + lane * N;
  if (column >= lookup.hidden) return;
  for (int axis = 0; axis < lookup.num_axes; ++axis) {
    const int64_t tile_axis = tile * lookup.num_axes + axis;
    for (uint32_t i = threadIdx.x / kTokenLanes; i < num_runs[axis];
         i += kPartialThreads / kTokenLanes) {
      const uint32_t run = plan.runs[tile_axis * kTileRuns + i];
      const int begin = run & 0xffff;
      const int length = run >> 16;
      const uint32_t* order = plan.order + tile_axis * kTile + begin;
      float sums[N] = {};
#pragma unroll 4
      for (int j = 0; j < length; ++j) {
        const int token = __ldg(order + j) & 0xffff;
        Vector<Grad, N> vector;
        vector.set_word(0, dynamic_shared_memory[token * kTokenLanes + lane]);
#pragma unroll
        for (int n = 0; n < N; ++n) sums[n] += vector.get(n);
      }
      Vector<float, N> result;
#pragma unroll
      for (int n = 0; n < N; ++n) result.set(n, sums[n]);
      float* partial = plan.partials + (tile_axis * kTileRuns + begin / kMinRun) * plan.pitch;
      store<N>(partial + column, result);
    }
  }
}

// Adds to `sums` a vector of each of the lanes in `lanes`, in their order: the one at rows +
// lane_offset, kUnroll of them in flight. `rows` may differ from lane to lane, and be null.
template <int N, typename T>
__device__ __forceinline__ void add_rows(const T* rows, int64_t lane_offset, unsigned lanes,
                                         float (&sums)[N]) {
  constexpr int kUnroll = 4;
  while (lanes != 0) {
    Vector<T, N> vectors[kUnroll];
    bool valid[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      valid[u] = lanes != 0 && rows != nullptr;
      const int source = lanes != 0 ? __ffs(lanes) - 1 : 0;
      lanes &= lanes - 1;
      const int64_t offset = __shfl_sync(kAllLanes, lane_offset, source);
      if (valid[u]) vectors[u] = load<N, Cache::kStream>(rows + offset);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (valid[u]) sums[n] += vectors[u].get(n);
      }
    }
  }
}

// One block at a time per row in use and kWarpSize * N columns. The warps share out the tiles, and
// the first adds up what they found.
template <typename Grad, typename Table, int N>
__global__ void __launch_bounds__(kFinishWarps* kWarpSize, 5) finish_kernel(const Plan plan) {
  constexpr int kColumns = kWarpSize * N;
  const Lookup& lookup = plan.params.lookup;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  auto* grad_table = static_cast<Table*>(plan.params.grad_table);

  auto* warp_sums = reinterpret_cast<float*>(dynamic_shared_memory) + lane * N;
  const auto num_slabs = static_cast<uint32_t>((lookup.hidden + kColumns - 1) / kColumns);
  const int num_tiles = static_cast<int>(plan.num_tiles);
  const int tiles_per_warp = (num_tiles + kFinishWarps - 1) / kFinishWarps;
  const uint32_t num_items = *plan.num_used_rows * num_slabs;
  for (uint32_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const uint32_t table_row = plan.used_rows[item / num_slabs];
    const uint32_t axis = table_row / static_cast<uint32_t>(lookup.num_rows);
    const int64_t column = int64_t{item % num_slabs} * kColumns + lane * N;
    const bool has_column = column < lookup.hidden;
    const float* partials = has_column ? plan.partials + column : nullptr;
    const Grad* grad = has_column ? static_cast<const Grad*>(plan.params.grad) +
                                        column * (N == 1 ? plan.params.grad_hidden_stride : 1)
                                  : nullptr;

    float sums[N] = {};
    const int last_tile = min((warp + 1) * tiles_per_warp, num_tiles);
    for (int first = warp * tiles_per_warp; first < last_tile; first += kWarpSize) {
      // A lane looks after a tile.
      const int tile = first + lane;
      const int64_t tile_axis = tile * lookup.num_axes + axis;
      const int segment = tile < last_tile ? plan.segments[table_row * plan.num_tiles + tile] : 0;
      const int position = segment - 1;
      const uint32_t* order = plan.order + tile_axis * kTile + position;
      const int length = segment != 0 ? __ldg(order) >> 16 : 0;
      const int num_runs = num_runs_of(length);

      for (int run = 0;; ++run) {
        const unsigned lanes = __ballot_sync(kAllLanes, run < num_runs);
        if (lanes == 0) break;
        int64_t offset = 0;
        if (run < num_runs) {
          const int begin = run_begin(position, length, run);
          offset = (tile_axis * kTileRuns + begin / kMinRun) * plan.pitch;
        }
        add_rows<N>(partials, offset, lanes, sums);
      }

      const int num_tokens = num_runs == 0 ? length : 0;
      for (int i = 0;; ++i) {
        const unsigned lanes = __ballot_sync(kAllLanes, i < num_tokens);
        if (lanes == 0) break;
        int64_t offset = 0;
        if (i < num_tokens) {
          offset = token_offsets(lookup, tile * kTile + (__ldg(order + i) & 0xffff)).rows;
        }
        add_rows<N>(grad, offset, lanes, sums);
      }
    }

#pragma unroll
    for (int n = 0; n < N; ++n) warp_sums[warp * kColumns + n] = sums[n];
    __syncthreads();
    if (warp == 0 && has_column) {
      Vector<Table, N> result;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        for (int other = 1; other < kFinishWarps; ++other) {
          sums[n] += warp_sums[other * kColumns + n];
        }
        result.set(n, sums[n]);
      }
      store_streaming<N>(grad_table + table_row * lookup.hidden + column, result);
    }
    __syncthreads();
  }

  // The other rows, last: few blocks have had a row to sum.
  for (int64_t row = int64_t{blockIdx.x} * kFinishWarps + warp; row < plan.table_rows;
       row += int64_t{gridDim.x} * kFinishWarps) {
    if (plan.row_used[row] != 0) continue;
    const Vector<Table, N> zeros;
    for (int64_t column = lane * N; column < lookup.hidden; column += kColumns) {
      store_streaming<N>(grad_table + row * lookup.hidden + column, zeros);
    }
  }
}

// Hands out the parts of one allocation.
class Workspace {
 public:
  template <typename T>
  void add(T*& part, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(&part), size_});
    size_ = (size_ + count * sizeof(T) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  }
  int64_t size() const { return size_; }
  void place(void* memory) const {
    for (const auto& part : parts_) *part.pointer = static_cast<char*>(memory) + part.offset;
  }

 private:
  struct Part {
    void** pointer;
    int64_t offset;
  };
  std::vector<Part> parts_;
  int64_t size_ = 0;
};

}  // namespace

void launch_backward(const Backward& params, const BackwardTensors& tensors) {
  const torch::stable::accelerator::DeviceGuard guard(tensors.grad.get_device_index());
  const cudaStream_t stream = current_stream(tensors.grad);
  const Lookup& lookup = params.lookup;
  Plan plan{};
  plan.params = params;
  plan.num_tiles = (lookup.num_tokens + kTile - 1) / kTile;
  plan.table_rows = lookup.num_axes * lookup.num_rows;
  check_num_tokens(lookup);

  dispatch(params.grad_dtype, [&](auto grad_type) {
    using Grad = typename decltype(grad_type)::type;
    constexpr int N = kVectorBytes / sizeof(Grad);
    constexpr int kColumns = kTokenLanes * N;
    const int64_t num_slabs = (lookup.hidden + kColumns - 1) / kColumns;
    plan.pitch = num_slabs * kColumns;

    const bool vectorise =
        can_vectorise_rows(lookup, params.grad, sizeof(Grad), N, params.grad_hidden_stride);
    const int columns = vectorise ? N * kWarpSize : kWarpSize;
    const int64_t items = plan.table_rows * ((lookup.hidden + columns - 1) / columns);
    check(items <= std::numeric_limits<int32_t>::max(), "table of shape [", lookup.num_axes, ", ",
          lookup.num_rows, ", ", lookup.hidden, "] is too large for the backward on CUDA");

    const int64_t tile_axes = plan.num_tiles * lookup.num_axes;
    Workspace workspace;
    workspace.add(plan.segments, plan.table_rows * plan.num_tiles);
    workspace.add(plan.row_used, plan.table_rows);
    workspace.add(plan.num_used_rows, 1);
    workspace.add(plan.num_runs, tile_axes);
    const int64_t zeroed_bytes = workspace.size();
    workspace.add(plan.used_rows, plan.table_rows);
    workspace.add(plan.order, tile_axes * kTile);
    workspace.add(plan.runs, tile_axes * kTileRuns);
    workspace.add(plan.partials, tile_axes * kTileRuns * plan.pitch);
    Tensor memory = torch::stable::new_empty(tensors.grad, {workspace.size()}, ScalarType::Byte);
    workspace.place(memory.mutable_data_ptr());

    check_cuda(cudaMemsetAsync(plan.segments, 0, zeroed_bytes, stream), "clearing the workspace");
    if (plan.num_tiles > 0) {
      launch("the backward's sort", sort_kernel, tile_axes, kSortThreads, kSortBytes, stream, plan);
      auto partial = vectorise ? partial_kernel<Grad, true> : partial_kernel<Grad, false>;
      check_cuda(
          cudaFuncSetAttribute(partial, cudaFuncAttributeMaxDynamicSharedMemorySize, kStageBytes),
          "the backward's shared memory");
      launch("the backward's partial sums", partial, plan.num_tiles * num_slabs, kPartialThreads,
             kStageBytes, stream, plan);
    }
    dispatch(params.table_dtype, [&](auto table_type) {
      using Table = typename decltype(table_type)::type;
      launch("the backward's last step",
             vectorise ? finish_kernel<Grad, Table, N> : finish_kernel<Grad, Table, 1>,
             std::min<int64_t>(items, kFinishBlocks), kFinishWarps * kWarpSize, kFinishBytes,
             stream, plan);
    });
  });
}

}  // namespace embedding_lookup

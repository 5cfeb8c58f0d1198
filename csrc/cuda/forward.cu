// out[t, h] = residual[t, h] + (padding[t] ? 0 : sum over k of weights[t, k] * table[row_k, h])
//
// One warp a token. A load is waited for only when all that can be requested before it has been:
//
//   1. ids, weights and padding    lane k looks after entry k (and k + 32, if K may be that large)
//   2. the residual                so that it arrives with the ids, not after them
//   3. the entries' rows           their addresses need the ids
//   4. the sums
//
// Memory traffic: the residual is read and the output written once, past the caches; the rows of
// the table in use (about 100 for an image) stay in the caches.

#include "common.cuh"

namespace embedding_lookup {
namespace {

// Tokens a block. Not tuned.
constexpr int kWarps = 8;

// Blocks that a multiprocessor is to have room for: 64 registers a thread, and 80 where the number
// of entries isn't known (0). Not tuned.
constexpr int min_blocks(int num_entries) { return num_entries > 0 ? 4 : 3; }

// ---------------------------------------------------------------------------------------------
// Arithmetic.

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162>;

__device__ __forceinline__ __half2 add_pairs(__half2 a, __half2 b) { return __hadd2_rn(a, b); }
__device__ __forceinline__ __nv_bfloat162 add_pairs(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hadd2_rn(a, b);
}
__device__ __forceinline__ void round_pair(float a, float b, __half2& pair) {
  pair = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void round_pair(float a, float b, __nv_bfloat162& pair) {
  pair = __floats2bfloat162_rn(a, b);
}

// a + b in 16 bits, two elements an instruction. A float32 sum rounded to 16 bits is the same
// number, because float32 has more than twice their significant bits, and two.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> add_packed(const Vector<T, N>& a, const Vector<T, N>& b) {
  Pair<T> left[N / 2], right[N / 2];
  std::memcpy(left, a.words, sizeof(left));
  std::memcpy(right, b.words, sizeof(right));
#pragma unroll
  for (int i = 0; i < N / 2; ++i) left[i] = add_pairs(left[i], right[i]);
  Vector<T, N> sum;
  std::memcpy(sum.words, left, sizeof(left));
  return sum;
}

__device__ __forceinline__ float round_to(ScalarType dtype, float value) {
  if (dtype == ScalarType::Half) return static_cast<float>(static_cast<Half>(value));
  if (dtype == ScalarType::BFloat16) return static_cast<float>(static_cast<BFloat16>(value));
  return value;
}

// 16-bit elements are rounded in pairs: a single one takes the slow pipe.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> round_floats(const float (&floats)[N]) {
  Vector<T, N> vector;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    Pair<T> pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) round_pair(floats[2 * i], floats[2 * i + 1], pairs[i]);
    std::memcpy(vector.words, pairs, sizeof(pairs));
  } else {
    T elements[N];
#pragma unroll
    for (int n = 0; n < N; ++n) elements[n] = static_cast<T>(floats[n]);
    vector.pack(elements);
  }
  return vector;
}

// sum += weight * term, both rounded: never fused.
template <bool kWeighted, typename T, int N>
__device__ __forceinline__ void add_term(const Vector<T, N>& term, float weight, float (&sum)[N]) {
  float elements[N];
  to_floats(term, elements);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sum[n] = __fadd_rn(sum[n], kWeighted ? __fmul_rn(weight, elements[n]) : elements[n]);
  }
}

// Residual + e. kAnyDtype: what e is rounded to need not be a dtype of the template.
template <typename Out, bool kAnyDtype, typename Residual, int N>
__device__ __forceinline__ Vector<Out, N> add_residual(const Lookup& lookup,
                                                       const Vector<Residual, N>& residual,
                                                       const float (&sum)[N]) {
  if constexpr (sizeof(Out) == 2 && N % 2 == 0) {
    static_assert(std::is_same_v<Out, Residual>, "16 bits: of the embedding and of the residual");
    return add_packed(residual, round_floats<Out>(sum));
  }
  float results[N];
  to_floats(residual, results);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float e = static_cast<float>(static_cast<Out>(sum[n]));
    if constexpr (kAnyDtype && std::is_same_v<Out, float>) e = round_to(lookup.embedding_dtype, e);
    results[n] += e;
  }
  return round_floats<Out>(results);
}

// ---------------------------------------------------------------------------------------------
// Requests.

template <bool kResidual, bool kMayBeAbsent, typename Residual, int N, int kUnroll>
__device__ __forceinline__ void load_residuals(const Lookup& lookup, const TokenOffsets& token,
                                               int column,
                                               Vector<Residual, N> (&residuals)[kUnroll]) {
  const auto num_columns = static_cast<int>(lookup.num_columns);
  const auto* residual = lookup.activation.data<const Residual>() + token.activation;
  const int64_t stride = N == 1 ? lookup.activation.last_stride : 1;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int c = column + u * kWarpSize * N;
    if (!kResidual || kMayBeAbsent) residuals[u] = filled<Residual, N>(-0.0f);
    const bool present = kResidual && (!kMayBeAbsent || lookup.activation.present());
    if (present && c < num_columns) {
      residuals[u] = load<N, Cache::kStream>(residual + c * stride);
    }
  }
}

// The entries of a warp's token, kSlots a lane: entry k is in slot k / 32 of lane k % 32.
template <typename Table, int kSlots>
struct Entries {
  RawId ids[kSlots];
  float weights[kSlots];
  const Table* rows[kSlots];  // their first elements; the table's if an entry has none
  unsigned have_row[kSlots];  // a bit for each lane whose entry has one

  // The last one again for the lanes that have none: a branch would be waited in.
  __device__ __forceinline__ static int entry(const Lookup& lookup, int slot, int lane) {
    return min(slot * kWarpSize + lane, static_cast<int>(lookup.num_entries) - 1);
  }

  template <bool kWeighted>
  __device__ __forceinline__ void request(const Lookup& lookup, const TokenOffsets& token,
                                          int lane) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int k = entry(lookup, slot, lane);
      ids[slot] = load_id(lookup, token, k);
      weights[slot] = kWeighted ? read_weight(lookup, token, k) : 1.0f;
    }
  }

  // An entry without a row has a weight of zero, and a term of zero.
  __device__ __forceinline__ void resolve(const Lookup& lookup, uint8_t padding, int lane) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int k = entry(lookup, slot, lane);
      const int64_t row = resolve_row(lookup, ids[slot], padding);
      have_row[slot] = __ballot_sync(kAllLanes, row != kNoRow);
      rows[slot] = lookup.table.data<const Table>();
      if (row == kNoRow) {
        weights[slot] = 0.0f;
      } else {
        rows[slot] += k * lookup.table.entry_stride + row * lookup.table.row_stride;
      }
    }
  }

  // What the lane that looks after entry k knows, on all lanes.
  __device__ __forceinline__ bool has_row(int k) const {
    const unsigned lanes = kSlots == 1 || k < kWarpSize ? have_row[0] : have_row[kSlots - 1];
    return (lanes >> k % kWarpSize & 1) != 0;
  }
  __device__ __forceinline__ const Table* row_of(int k) const {
    const Table* row = kSlots == 1 || k < kWarpSize ? rows[0] : rows[kSlots - 1];
    const auto address = reinterpret_cast<uint64_t>(row);
    return reinterpret_cast<const Table*>(__shfl_sync(kAllLanes, address, k % kWarpSize));
  }
  __device__ __forceinline__ float weight_of(int k) const {
    const float weight = kSlots == 1 || k < kWarpSize ? weights[0] : weights[kSlots - 1];
    return __shfl_sync(kAllLanes, weight, k % kWarpSize);
  }
};

// What all lanes know of kBatch entries, from `first` on, of which `num_entries` are there. No load
// can be moved ahead of what the lanes tell each other, so that comes before all of them.
template <typename Table, int kBatch>
struct Batch {
  const Table* rows[kBatch];
  float weights[kBatch];
  bool exists[kBatch];
  bool has_row[kBatch];

  template <bool kWeighted, int kSlots>
  __device__ __forceinline__ void share(const Entries<Table, kSlots>& entries, int first,
                                        int num_entries) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int k = min(first + b, num_entries - 1);
      exists[b] = first + b < num_entries;
      has_row[b] = exists[b] && entries.has_row(k);
      rows[b] = entries.row_of(k);
      if (kWeighted) weights[b] = entries.weight_of(k);
    }
  }
};

// A batch's rows, added in order. A lane has kUnroll vectors of each, of which those that begin
// before num_columns are there. With kSkip an entry without a row is left out, which changes no bit
// of a sum that began with +0; else a zero is added.
template <bool kWeighted, bool kPacked, bool kSkip, int kUnroll, typename Table, int N, int kBatch>
__device__ __forceinline__ void add_rows(const Batch<Table, kBatch>& batch, int column,
                                         int num_columns, float (&sums)[kUnroll][N],
                                         Vector<Table, N> (&packed_sums)[kUnroll]) {
  Vector<Table, N> terms[kBatch][kUnroll];
#pragma unroll
  for (int i = 0; i < kBatch * kUnroll; ++i) {
    const int b = i / kUnroll;
    const int u = i % kUnroll;
    const int c = column + u * kWarpSize * N;
    if (!kSkip) terms[b][u] = filled<Table, N>(0.0f);
    if (batch.has_row[b] && c < num_columns) terms[b][u] = load<N, Cache::kKeep>(batch.rows[b] + c);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if constexpr (kPacked) {
      packed_sums[u] = add_packed(terms[0][u], terms[1][u]);
    } else {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (kSkip ? batch.has_row[b] : batch.exists[b]) {
          add_term<kWeighted>(terms[b][u], batch.weights[b], sums[u]);
        }
      }
    }
  }
}

// A block has kWarps tokens, a warp one of them. A lane takes every 32nd vector of N columns,
// kUnroll of them at a time, of kBatch rows at a time.
//
// K entries a token. If K is 0, as many as the lookup has, with or without weights and a residual:
// a weight of 1 and a residual of -0 change no bit.
template <typename Table, typename Residual, typename Out, int N, int K, bool kWeighted,
          bool kResidual>
__global__ void __launch_bounds__(kWarps* kWarpSize, min_blocks(K))
    forward_kernel(const Lookup lookup) {
  constexpr bool kPacked = K == 2 && !kWeighted && sizeof(Out) == 2;
  // Not tuned. Gemma 4's 768 16-bit columns are three vectors a lane, Qwen's 1152 four and a half.
  // tests/devices/test_cuda_binary.py counts in the machine code what these make of the loads.
  constexpr int kBatch = K > 0 ? K : 4;
  constexpr int kUnroll = K == 2 ? 3 : 1;
  constexpr int kStep = kUnroll * kWarpSize * N;
  const auto num_columns = static_cast<int>(lookup.num_columns);
  const int num_entries = K > 0 ? K : static_cast<int>(lookup.num_entries);
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t token = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  if (token >= lookup.num_tokens) return;

  const TokenOffsets offsets = token_offsets(lookup, token);
  static_assert(kMaxEntries == 2 * kWarpSize && K <= kWarpSize, "what two slots a lane hold");
  Entries<Table, K == 0 ? 2 : 1> entries;
  entries.template request<kWeighted>(lookup, offsets, lane);
  const uint8_t padding = load_padding(lookup, offsets);
  Vector<Residual, N> residuals[kUnroll];
  load_residuals<kResidual, K == 0>(lookup, offsets, lane * N, residuals);
  entries.resolve(lookup, padding, lane);

  auto* out = lookup.out.data<Out>() + int64_t{token} * num_columns + lane * N;
  Batch<Table, kBatch> batch;
  if (K > 0) batch.template share<kWeighted>(entries, 0, K);
  int column = lane * N;
  if (K > 0 && column >= num_columns) return;
  for (;;) {
    if (K > 0 && column >= num_columns) __builtin_unreachable();  // a check less for each vector
    // -0 changes no bit of the first term; with weights from +0, as eager's sum does.
    const float zero = kWeighted && (K > 0 || lookup.weights.present()) ? 0.0f : -0.0f;
    float sums[kUnroll][N];
    Vector<Table, N> packed_sums[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll * N; ++i) sums[i / N][i % N] = zero;
    for (int k = 0; k < num_entries; k += kBatch) {
      if (K == 0) batch.template share<kWeighted>(entries, k, num_entries);
      add_rows<kWeighted, kPacked, kWeighted && (K > 0)>(batch, column, num_columns, sums,
                                                         packed_sums);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int c = column + u * kWarpSize * N;
      if (c >= num_columns) break;
      Vector<Out, N> result;
      if constexpr (kPacked) {
        result = kResidual ? add_packed(residuals[u], packed_sums[u]) : packed_sums[u];
      } else {
        result = add_residual<Out, K == 0>(lookup, residuals[u], sums[u]);
      }
      store_streaming<N>(out + u * kWarpSize * N, result);
    }
    column += kStep;
    out += kStep;
    // Lanes that have to tell the others of their entries stay until the last is done.
    if (column - (K > 0 ? 0 : lane * N) >= num_columns) return;
    load_residuals<kResidual, K == 0>(lookup, offsets, column, residuals);
  }
}

using Kernel = void (*)(Lookup);

// The kernel for one dtype everywhere and whole vectors, where there is one: Gemma 4's lookup and
// the Qwen3-VL family's. Null for others.
template <typename T, int N>
Kernel main_kernel(const Lookup& lookup) {
  const bool weighted = lookup.weights.present();
  const bool residual = lookup.activation.present();
  if (lookup.num_entries == 2 && !weighted) {
    return residual ? forward_kernel<T, T, T, N, 2, false, true>
                    : forward_kernel<T, T, T, N, 2, false, false>;
  }
  if (lookup.num_entries == 4 && weighted) {
    return residual ? forward_kernel<T, T, T, N, 4, true, true>
                    : forward_kernel<T, T, T, N, 4, true, false>;
  }
  return nullptr;
}

template <typename Table, typename Residual, typename Out>
Kernel choose_kernel(const Lookup& lookup) {
  constexpr int N = kVectorBytes / std::max(sizeof(Table), sizeof(Residual));
  const TableOperand& table = lookup.table;
  const bool vectorise =
      lookup.num_columns % N == 0 &&
      can_vectorise(table.data<const char>(), sizeof(Table), N,
                    {table.entry_stride, table.row_stride}) &&
      (!lookup.activation.present() || can_vectorise_activation(lookup, sizeof(Residual), N));
  if (!vectorise) return forward_kernel<Table, Residual, Out, 1, 0, true, true>;
  if constexpr (std::is_same_v<Table, Residual> && std::is_same_v<Table, Out>) {
    const bool one_dtype = lookup.embedding_dtype == table.dtype;
    if (Kernel kernel = one_dtype ? main_kernel<Table, N>(lookup) : nullptr) return kernel;
  }
  return forward_kernel<Table, Residual, Out, N, 0, true, true>;
}

}  // namespace

void launch_forward(const Lookup& lookup, torch::stable::Device device) {
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  check_counts(lookup);
  const bool has_residual = lookup.activation.present();
  const ScalarType residual_dtype = has_residual ? lookup.activation.dtype : lookup.embedding_dtype;
  dispatch(lookup.table.dtype, [&](auto table_type) {
    dispatch(residual_dtype, [&](auto residual_type) {
      using Table = typename decltype(table_type)::type;
      using Residual = typename decltype(residual_type)::type;
      const Kernel kernel = lookup.out.dtype == residual_dtype
                                ? choose_kernel<Table, Residual, Residual>(lookup)
                                : choose_kernel<Table, Residual, float>(lookup);
      launch("the forward", kernel, (lookup.num_tokens + kWarps - 1) / kWarps, kWarps * kWarpSize,
             0, current_stream(device), lookup);
    });
  });
}

std::string pending_device_error() {
  const cudaError_t error = cudaPeekAtLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace embedding_lookup

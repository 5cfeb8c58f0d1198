// The CPU kernels: plain loops over one row at a time, which the compiler vectorises.
//
// How threads map to data is decided in launch.cpp: the forward gives each thread a range of
// tokens, the backward a range of columns (so every sum has one thread and one order, however many
// threads there are).
//
// No include guard: baseline.cpp, avx2.cpp and avx512.cpp each include this once, with
// CPU_CAPABILITY naming their namespace, CPU_VECTOR_BYTES the width of a vector register and the
// compiler set to their instruction set. All of it
// has internal linkage and calls no function template from outside, or the linker could keep one
// instruction set's copy of it for everyone. For the same reason every other header comes first.

namespace embedding_lookup {
namespace CPU_CAPABILITY {
namespace {

using c10::BFloat16;
using c10::Half;

// Rows that are not contiguous are gathered this many elements at a time.
constexpr int64_t kGather = 256;

// Residual and gradient are read once, in the order of the tokens, from memory. Each row is asked
// for this many tokens ahead: the hardware's own prefetch starts anew with every page.
constexpr int64_t kTokensAhead = 4;

// ----- dtypes --------------------------------------------------------------------------------

struct None {};  // the residual's type when there is none

// The type in which values of T are added.
template <typename T>
using OpMath = std::conditional_t<std::is_same_v<T, double>, double, float>;

// promote_types(Table, Residual)
template <typename Table, typename Residual>
using Promoted = std::conditional_t<
    std::is_same_v<Residual, None> || std::is_same_v<Residual, Table>, Table,
    std::conditional_t<std::is_same_v<Table, double> || std::is_same_v<Residual, double>, double,
                       float>>;

// The type of the backward's sums. float64 for a float32 table keeps a sum of thousands of terms
// within one unit in the last place; the sums stay in the cache, so no more goes to memory for it.
template <typename Table>
using Sum = std::conditional_t<sizeof(Table) == 2, float, double>;

// Calls `f` with a null pointer to the C++ type of `dtype`.
template <typename F>
void visit(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    default:  // the checks let nothing else through
      return f(static_cast<double*>(nullptr));
  }
}

// ----- vectors -------------------------------------------------------------------------------

// The forward's main path works on Block<T>: kSize values of T as float32, in two vectors. Plain
// loops would do but for two things that compilers don't do well or at all: conversions of 16-bit
// types (the backward's of float16 among them), and streaming stores, which write a result too
// large for the caches without reading it into them.

typedef float Floats __attribute__((vector_size(CPU_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(CPU_VECTOR_BYTES)));

template <bool kStream>
void store(void* to, Words words) {
  if constexpr (kStream) {
#if CPU_VECTOR_BYTES == 64
    return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)words);
#elif CPU_VECTOR_BYTES == 32
    return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)words);
#endif
  }
  __builtin_memcpy(to, &words, sizeof(words));
}

template <typename T>
struct Block {
  static constexpr int64_t kSize = 0;  // none for this type
};

template <>
struct Block<float> {
  static constexpr int64_t kSize = CPU_VECTOR_BYTES / 2;
  Floats first, second;

  static Block load(const float* from) {
    // One after the other: GCC copies a pair of 32-byte vectors by way of the stack.
    Block block;
    __builtin_memcpy(&block.first, from, sizeof(block.first));
    __builtin_memcpy(&block.second, from + kSize / 2, sizeof(block.second));
    return block;
  }

  void add(const Block& other) {
    first += other.first;
    second += other.second;
  }

  void round() {}

  template <bool kStream>
  void round_and_store(float* to) {
    store<kStream>(to, (Words)first);
    store<kStream>(to + kSize / 2, (Words)second);
  }
};

// Each 32-bit word holds two bfloat16: first the upper halves, which are float32 already but for
// the lower bits, then the lower halves.
template <>
struct Block<BFloat16> {
  static constexpr int64_t kSize = CPU_VECTOR_BYTES / 2;
  Words upper, lower;  // float32 bits

  static Block load(const BFloat16* from) {
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    return {words & 0xffff0000u, words << 16};
  }

  void add(const Block& other) {
    upper = (Words)((Floats)upper + (Floats)other.upper);
    lower = (Words)((Floats)lower + (Floats)other.lower);
  }

  // To nearest, ties to even. A NaN stays one: what is added here is the sum of bfloat16 values, so
  // the lower bits of a NaN are zero and don't carry.
  void round() {
    upper = (upper + 0x7fff + ((upper >> 16) & 1)) & 0xffff0000u;
    lower = (lower + 0x7fff + ((lower >> 16) & 1)) & 0xffff0000u;
  }

  template <bool kStream>
  void round_and_store(BFloat16* to) {
    round();
    store<kStream>(to, upper | (lower >> 16));
  }
};

#if CPU_VECTOR_BYTES > 16  // AVX2 and later convert float16 themselves
template <>
struct Block<Half> {
  static constexpr int64_t kSize = CPU_VECTOR_BYTES / 2;
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  Floats first, second;

#if CPU_VECTOR_BYTES == 64
  using Packed = __m256i;  // half a block
  // The forms with a (full) mask, because GCC 12 warns of its own unmasked ones.
  static Floats unpack(Packed packed) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, packed); }
  static Packed pack(Floats floats) {
    return _mm512_maskz_cvtps_ph(0xffff, (__m512)floats, kNearest);
  }
  static void stream(Packed* to, Packed packed) { _mm256_stream_si256(to, packed); }
#else
  using Packed = __m128i;
  static Floats unpack(Packed packed) { return (Floats)_mm256_cvtph_ps(packed); }
  static Packed pack(Floats floats) { return _mm256_cvtps_ph((__m256)floats, kNearest); }
  static void stream(Packed* to, Packed packed) { _mm_stream_si128(to, packed); }
#endif

  static Block load(const Half* from) {
    Packed low, high;
    __builtin_memcpy(&low, from, sizeof(low));
    __builtin_memcpy(&high, from + kSize / 2, sizeof(high));
    return {unpack(low), unpack(high)};
  }

  void add(const Block& other) {
    first += other.first;
    second += other.second;
  }

  void round() {
    first = unpack(pack(first));
    second = unpack(pack(second));
  }

  template <bool kStream>
  void round_and_store(Half* to) {
    const Packed packed[2] = {pack(first), pack(second)};
    if constexpr (kStream) {
      stream(reinterpret_cast<Packed*>(to), packed[0]);
      stream(reinterpret_cast<Packed*>(to) + 1, packed[1]);
    } else {
      __builtin_memcpy(to, &packed[0], sizeof(Packed));
      __builtin_memcpy(to + kSize / 2, &packed[1], sizeof(Packed));
    }
  }
};
#endif

// ----- rows ----------------------------------------------------------------------------------

// The part of forward_row that goes in blocks, from column 0. Returns how many columns it did.
template <bool kStream, int N, typename T, typename Residual>
int64_t forward_blocks(const T* const* rows, const Residual* residual, T* out, int64_t width) {
  int64_t h = 0;
  for (; h + Block<T>::kSize <= width; h += Block<T>::kSize) {
    auto value = Block<T>::load(rows[0] + h);
    for (int n = 1; n < N; ++n) value.add(Block<T>::load(rows[n] + h));
    if constexpr (!std::is_same_v<Residual, None>) {
      if constexpr (N > 1) value.round();
      value.add(Block<T>::load(residual + h));
    }
    value.template round_and_store<kStream>(out + h);
  }
  return h;
}

// out[h] = residual[h] + round_to_Table(rows[0][h] + ... + rows[N - 1][h])
template <int N, typename Table, typename Residual, typename Out>
void forward_row(const Table* const* table_rows, const Residual* residual, Out* __restrict out,
                 int64_t width, bool stream) {
  using Math = OpMath<Out>;
  const Table* rows[N + 1];
  for (int n = 0; n < N; ++n) rows[n] = table_rows[n];

  int64_t h = 0;
  if constexpr (N > 0 && Block<Table>::kSize > 0 && std::is_same_v<Table, Out> &&
                (std::is_same_v<Residual, None> || std::is_same_v<Residual, Table>)) {
    h = stream ? forward_blocks<true, N>(rows, residual, out, width)
               : forward_blocks<false, N>(rows, residual, out, width);
  }
  for (; h < width; ++h) {
    Math value = 0;
    if constexpr (N > 0) {
      auto sum = static_cast<OpMath<Table>>(rows[0][h]);
      for (int n = 1; n < N; ++n) sum += rows[n][h];
      value = static_cast<Math>(static_cast<Table>(sum));
    }
    if constexpr (!std::is_same_v<Residual, None>) value += static_cast<Math>(residual[h]);
    out[h] = static_cast<Out>(value);
  }
}

template <typename Table, typename Residual, typename Out>
void forward_row(int num_rows, const Table* const* rows, const Residual* residual, Out* out,
                 int64_t width, bool stream) {
  switch (num_rows) {
    case 0:
      return forward_row<0>(rows, residual, out, width, stream);
    case 1:
      return forward_row<1>(rows, residual, out, width, stream);
    case 2:
      return forward_row<2>(rows, residual, out, width, stream);
    case 3:
      return forward_row<3>(rows, residual, out, width, stream);
    default:
      return forward_row<4>(rows, residual, out, width, stream);
  }
}

// sums[n][h] += grad[h]. The rows of different axes never overlap, which the compiler can't know.
template <int N, typename Acc, typename Grad>
void accumulate_row(Acc* const* sum_rows, const Grad* grad, int64_t width) {
  Acc* sums[N];
  for (int n = 0; n < N; ++n) sums[n] = sum_rows[n];
  int64_t h = 0;
  if constexpr (std::is_same_v<Grad, Half> && std::is_same_v<Acc, float> &&
                Block<Grad>::kSize > 0) {
    for (; h + Block<Grad>::kSize <= width; h += Block<Grad>::kSize) {
      const auto value = Block<Grad>::load(grad + h);
      for (int n = 0; n < N; ++n) {
        auto sum = Block<float>::load(sums[n] + h);
        sum.add({value.first, value.second});
        sum.template round_and_store<false>(sums[n] + h);
      }
    }
  }
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (; h < width; ++h) {
    const Acc value = static_cast<OpMath<Grad>>(grad[h]);
    for (int n = 0; n < N; ++n) sums[n][h] += value;
  }
}

template <typename Acc, typename Grad>
void accumulate_row(int num_rows, Acc* const* sums, const Grad* grad, int64_t width) {
  switch (num_rows) {
    case 1:
      return accumulate_row<1>(sums, grad, width);
    case 2:
      return accumulate_row<2>(sums, grad, width);
    case 3:
      return accumulate_row<3>(sums, grad, width);
    case 4:
      return accumulate_row<4>(sums, grad, width);
  }
}

template <typename T>
void prefetch_row_ahead(const Lookup& lookup, const T* row, int64_t width) {
  if (lookup.num_token_dims == 0) return;
  const int64_t step = lookup.rows_strides[lookup.num_token_dims - 1];
  // A number and not a pointer: it may lie outside the tensor, which a prefetch doesn't mind.
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(row) + kTokensAhead * step * sizeof(T);
  for (uintptr_t byte = 0; byte < width * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + byte));
  }
}

// Calls `f(offset, width, row)` on a row [width] of the residual or the gradient: whole if its
// elements are next to each other, else on copies of kGather elements of it.
template <typename T, typename F>
void read_row(const Lookup& lookup, const T* row, int64_t stride, int64_t width, const F& f) {
  if (stride == 1) {
    prefetch_row_ahead(lookup, row, width);
    return f(0, width, row);
  }
  T gathered[kGather];
  for (int64_t offset = 0; offset < width; offset += kGather) {
    const int64_t count = width - offset < kGather ? width - offset : kGather;
    for (int64_t h = 0; h < count; ++h) gathered[h] = row[(offset + h) * stride];
    f(offset, count, gathered);
  }
}

// ----- tokens --------------------------------------------------------------------------------

template <typename Table, typename Residual>
int64_t forward_tokens(const Forward& params, int64_t begin, int64_t end, bool stream) {
  using Out = Promoted<Table, Residual>;
  const Lookup& lookup = params.lookup;
  const auto* table = static_cast<const Table*>(params.table);
  auto* out = static_cast<Out*>(params.out) + begin * lookup.hidden;
  int64_t first_bad = -1;
  TokenCursor cursor(lookup, begin);
  for (int64_t token = begin; token < end; ++token, cursor.next(), out += lookup.hidden) {
    const Table* rows[kMaxAxes];
    int num_rows = 0;
    bool bad = false;
    for (int64_t axis = 0; axis < lookup.num_axes; ++axis) {
      const int64_t row = cursor.row(axis);
      if (row >= lookup.num_rows) {
        if (first_bad < 0) first_bad = token * lookup.num_axes + axis;
        bad = true;
      } else if (row >= 0) {
        rows[num_rows++] = table + axis * params.table_axis_stride + row * params.table_row_stride;
      }
    }
    if (bad) continue;
    if (cursor.is_padding()) num_rows = 0;
    if constexpr (std::is_same_v<Residual, None>) {
      forward_row(num_rows, rows, static_cast<const None*>(nullptr), out, lookup.hidden, stream);
    } else {
      read_row(lookup, static_cast<const Residual*>(params.residual) + cursor.rows,
               params.residual_hidden_stride, lookup.hidden,
               [&](int64_t offset, int64_t width, const Residual* residual) {
                 const Table* at_offset[kMaxAxes];
                 for (int n = 0; n < num_rows; ++n) at_offset[n] = rows[n] + offset;
                 forward_row(num_rows, at_offset, residual, out + offset, width, stream);
               });
    }
  }
#if CPU_VECTOR_BYTES > 16
  if (stream) _mm_sfence();  // before other threads read the result
#endif
  return first_bad;
}

template <typename Acc, typename Grad>
void accumulate_tokens(const Backward& params, const int32_t* slots, int64_t column, int64_t width,
                       Acc* sums) {
  const Lookup& lookup = params.lookup;
  const auto* grad = static_cast<const Grad*>(params.grad) + column * params.grad_hidden_stride;
  TokenCursor cursor(lookup, 0);
  for (int64_t token = 0; token < lookup.num_tokens; ++token, cursor.next()) {
    Acc* rows[kMaxAxes];
    int num_rows = 0;
    for (int64_t axis = 0; axis < lookup.num_axes; ++axis) {
      const int64_t slot = *slots++;
      if (slot >= 0) rows[num_rows++] = sums + slot * width;
    }
    if (num_rows == 0) continue;
    read_row(lookup, grad + cursor.rows, params.grad_hidden_stride, width,
             [&](int64_t offset, int64_t count, const Grad* values) {
               Acc* at_offset[kMaxAxes];
               for (int n = 0; n < num_rows; ++n) at_offset[n] = rows[n] + offset;
               accumulate_row(num_rows, at_offset, values, count);
             });
  }
}

// ----- entry points --------------------------------------------------------------------------

int64_t forward(const Forward& params, int64_t begin, int64_t end, bool stream) {
  int64_t first_bad = -1;
  visit(params.table_dtype, [&](auto* table) {
    using Table = std::remove_pointer_t<decltype(table)>;
    if (params.residual == nullptr) {
      first_bad = forward_tokens<Table, None>(params, begin, end, stream);
      return;
    }
    visit(params.residual_dtype, [&](auto* residual) {
      using Residual = std::remove_pointer_t<decltype(residual)>;
      first_bad = forward_tokens<Table, Residual>(params, begin, end, stream);
    });
  });
  return first_bad;
}

void accumulate(const Backward& params, const int32_t* slots, int64_t column, int64_t width,
                void* sums) {
  visit(params.grad_dtype, [&](auto* grad) {
    using Grad = std::remove_pointer_t<decltype(grad)>;
    visit(params.table_dtype, [&](auto* table) {
      using Acc = Sum<std::remove_pointer_t<decltype(table)>>;
      accumulate_tokens<Acc, Grad>(params, slots, column, width, static_cast<Acc*>(sums));
    });
  });
}

void store(const Backward& params, const void* sums, int64_t width, void* out) {
  visit(params.table_dtype, [&](auto* table) {
    using Table = std::remove_pointer_t<decltype(table)>;
    const auto* from = static_cast<const Sum<Table>*>(sums);
    auto* __restrict to = static_cast<Table*>(out);
    int64_t h = 0;
    if constexpr (std::is_same_v<Table, Half> && Block<Table>::kSize > 0) {
      for (; h + Block<Table>::kSize <= width; h += Block<Table>::kSize) {
        const auto sum = Block<float>::load(from + h);
        Block<Table>{sum.first, sum.second}.template round_and_store<false>(to + h);
      }
    }
    for (; h < width; ++h) to[h] = static_cast<Table>(from[h]);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace embedding_lookup

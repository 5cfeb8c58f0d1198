// Vectors: blocks of values in the registers, however the tensors store them.
//
// Plain loops would do but for two things that compilers don't do well or at all: conversions of
// 16-bit types, and streaming stores, which write a result too large for the caches without reading
// it into them.
//
// No include guard: see kernels.h.

namespace embedding_lookup {
namespace CPU_CAPABILITY {
namespace {

using c10::BFloat16;
using c10::Half;

// ----- dtypes --------------------------------------------------------------------------------

struct None {};  // the residual's type when there is none

// The type in which values of T are added.
template <typename T>
using OpMath = std::conditional_t<std::is_same_v<T, double>, double, float>;

// promote_types(A, B)
template <typename A, typename B>
using Promoted = std::conditional_t<
    std::is_same_v<B, None> || std::is_same_v<B, A>, A,
    std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>>;

// The type of the backward's sums, see sum_size.
template <typename Table>
using Sum = std::conditional_t<sizeof(Table) == 2, float, double>;

// Calls `f` with a null pointer to the C++ type of `dtype`.
template <typename F>
auto visit(ScalarType dtype, const F& f) {
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

// ----- blocks --------------------------------------------------------------------------------

typedef float Floats __attribute__((vector_size(CPU_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(CPU_VECTOR_BYTES)));
typedef uint16_t Halfwords __attribute__((vector_size(CPU_VECTOR_BYTES / 2)));

template <bool kStream>
void store_words(void* to, Words words) {
  if constexpr (kStream) {
#if CPU_VECTOR_BYTES == 64
    return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)words);
#elif CPU_VECTOR_BYTES == 32
    return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)words);
#endif
  }
  __builtin_memcpy(to, &words, sizeof(words));
}

// Neighbouring values as float32, in the order of the type that they were loaded as.
struct Block {
  Floats first, second;

  void add(const Block& other) {
    first += other.first;
    second += other.second;
  }
  void scale(float factor) {
    first *= factor;
    second *= factor;
  }
};
constexpr int64_t kBlock = 2 * sizeof(Floats) / sizeof(float);

// How values of T become a block and the other way round.
template <typename T>
struct Packed {
  static constexpr bool kExists = false;
};

template <>
struct Packed<float> {
  static constexpr bool kExists = true;

  static Block load(const float* from) {
    // One after the other: GCC copies a pair of 32-byte vectors by way of the stack.
    Block block;
    __builtin_memcpy(&block.first, from, sizeof(block.first));
    __builtin_memcpy(&block.second, from + kBlock / 2, sizeof(block.second));
    return block;
  }
  static Block round(const Block& block) { return block; }

  template <bool kStream>
  static void round_and_store(float* to, const Block& block) {
    store_words<kStream>(to, (Words)block.first);
    store_words<kStream>(to + kBlock / 2, (Words)block.second);
  }
};

// Each 32-bit word holds two bfloat16: first the upper halves, which are float32 already but for
// the lower bits, then the lower halves.
template <>
struct Packed<BFloat16> {
  static constexpr bool kExists = true;

  static Block load(const BFloat16* from) {
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    return {(Floats)(words & 0xffff0000u), (Floats)(words << 16)};
  }

  // To nearest, ties to even; the lower bits are zero. A NaN whose lower bits would carry into its
  // sign is set to the usual one.
  static Words round_words(Floats floats) {
    const Words words = (Words)floats;
    const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) & 0xffff0000u;
    const Words nan = Words{} + 0x7fc00000u;
    return floats == floats ? rounded : nan;
  }
  static Block round(const Block& block) {
    return {(Floats)round_words(block.first), (Floats)round_words(block.second)};
  }

  template <bool kStream>
  static void round_and_store(BFloat16* to, const Block& block) {
    store_words<kStream>(to, round_words(block.first) | (round_words(block.second) >> 16));
  }

  // Of a block that was loaded as another type.
  template <bool kStream>
  static void round_and_store_in_order(BFloat16* to, const Block& block) {
    const Halfwords halves[2] = {
        __builtin_convertvector(round_words(block.first) >> 16, Halfwords),
        __builtin_convertvector(round_words(block.second) >> 16, Halfwords)};
    Words words;
    __builtin_memcpy(&words, halves, sizeof(words));
    store_words<kStream>(to, words);
  }
};

#if CPU_VECTOR_BYTES > 16  // AVX2 and later convert float16 themselves
template <>
struct Packed<Half> {
  static constexpr bool kExists = true;
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

#if CPU_VECTOR_BYTES == 64
  using Halves = __m256i;  // half a block
  // The forms with a (full) mask, because GCC 12 warns of its own unmasked ones.
  static Floats unpack(Halves halves) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, halves); }
  static Halves pack(Floats floats) {
    return _mm512_maskz_cvtps_ph(0xffff, (__m512)floats, kNearest);
  }
  static void stream(Halves* to, Halves halves) { _mm256_stream_si256(to, halves); }
#else
  using Halves = __m128i;
  static Floats unpack(Halves halves) { return (Floats)_mm256_cvtph_ps(halves); }
  static Halves pack(Floats floats) { return _mm256_cvtps_ph((__m256)floats, kNearest); }
  static void stream(Halves* to, Halves halves) { _mm_stream_si128(to, halves); }
#endif

  static Block load(const Half* from) {
    Halves low, high;
    __builtin_memcpy(&low, from, sizeof(low));
    __builtin_memcpy(&high, from + kBlock / 2, sizeof(high));
    return {unpack(low), unpack(high)};
  }
  static Block round(const Block& block) {
    return {unpack(pack(block.first)), unpack(pack(block.second))};
  }

  template <bool kStream>
  static void round_and_store(Half* to, const Block& block) {
    const Halves halves[2] = {pack(block.first), pack(block.second)};
    if constexpr (kStream) {
      stream(reinterpret_cast<Halves*>(to), halves[0]);
      stream(reinterpret_cast<Halves*>(to) + 1, halves[1]);
    } else {
      __builtin_memcpy(to, &halves[0], sizeof(Halves));
      __builtin_memcpy(to + kBlock / 2, &halves[1], sizeof(Halves));
    }
  }
};
#endif

// ----- float64 -------------------------------------------------------------------------------

// Half a vector of float32 as a vector of float64, and back.
typedef double Doubles __attribute__((vector_size(CPU_VECTOR_BYTES)));
constexpr int64_t kDoubles = sizeof(Doubles) / sizeof(double);

Doubles load_doubles(const float* from) {
#if CPU_VECTOR_BYTES == 64
  return (Doubles)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));
#elif CPU_VECTOR_BYTES == 32
  return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  Doubles doubles;
  for (int64_t i = 0; i < kDoubles; ++i) doubles[i] = from[i];
  return doubles;
#endif
}

template <bool kStream>
void round_and_store_doubles(float* to, Doubles doubles) {
#if CPU_VECTOR_BYTES == 64
  const __m256 floats = _mm512_maskz_cvtpd_ps(0xff, (__m512d)doubles);
  return kStream ? _mm256_stream_ps(to, floats) : _mm256_storeu_ps(to, floats);
#elif CPU_VECTOR_BYTES == 32
  const __m128 floats = _mm256_cvtpd_ps((__m256d)doubles);
  return kStream ? _mm_stream_ps(to, floats) : _mm_storeu_ps(to, floats);
#else
  for (int64_t i = 0; i < kDoubles; ++i) to[i] = static_cast<float>(doubles[i]);
#endif
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace embedding_lookup

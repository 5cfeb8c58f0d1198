// The CPU's forward: plain loops over one token at a time, in blocks where the dtypes allow.
//
// No include guard: see kernels.h.

namespace embedding_lookup {
namespace CPU_CAPABILITY {
namespace {

// Where the types differ, sums go through the cache this many columns at a time.
constexpr int64_t kChunk = 256;

// The residual is read once, in the order of the tokens, from memory. Each token's is asked for
// this many tokens ahead: the hardware's own prefetch starts anew with every page.
constexpr int64_t kTokensAhead = 4;

// What a token adds up, in order.
template <typename Table>
struct Terms {
  int count;
  bool from_zero;  // the sum starts from +0, not from the first term
  const Table* rows[kMaxEntries];
  float weights[kMaxEntries];  // if there are any
};

// ----- one token, all types alike --------------------------------------------------------------

// The part that goes in blocks, from column 0. Returns how many columns that is. N is the number of
// terms, or 0 for any. `ahead`: where the residual of some tokens ahead is.
template <bool kStream, bool kWeighted, int N, typename T, typename Residual>
int64_t write_blocks(const Terms<T>& terms, const Residual* residual, uintptr_t ahead, T* out,
                     int64_t width) {
  const int count = N > 0 ? N : terms.count;
  int64_t h = 0;
  for (; h + kBlock <= width; h += kBlock) {
    Block sum = {};
    int n = 0;
    if (!kWeighted && (N > 0 || !terms.from_zero)) sum = Packed<T>::load(terms.rows[n++] + h);
    for (; n < count; ++n) {
      Block term = Packed<T>::load(terms.rows[n] + h);
      if constexpr (kWeighted) term.scale(terms.weights[n]);
      sum.add(term);
    }
    if constexpr (!std::is_same_v<Residual, None>) {
      for (int64_t byte = 0; byte < kBlock * int64_t{sizeof(T)}; byte += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + h * sizeof(T) + byte));
      }
      if constexpr (kWeighted || N != 1) sum = Packed<T>::round(sum);
      sum.add(Packed<T>::load(residual + h));
    }
    Packed<T>::template round_and_store<kStream>(out + h, sum);
  }
  return h;
}

template <bool kStream, bool kWeighted, typename T, typename Residual>
int64_t write_blocks(const Terms<T>& terms, const void* residual_data, uintptr_t ahead,
                     void* out_data, int64_t width) {
  const auto* residual = static_cast<const Residual*>(residual_data);
  auto* out = static_cast<T*>(out_data);
  // Without weights only an entry that padding_id leaves out starts a sum of others from +0.
  switch (terms.from_zero && !kWeighted ? 0 : terms.count) {
    case 1:
      return write_blocks<kStream, kWeighted, 1>(terms, residual, ahead, out, width);
    case 2:
      return write_blocks<kStream, kWeighted, 2>(terms, residual, ahead, out, width);
    case 4:
      return write_blocks<kStream, kWeighted, 4>(terms, residual, ahead, out, width);
    default:
      return write_blocks<kStream, kWeighted, 0>(terms, residual, ahead, out, width);
  }
}

template <typename T>
using WriteBlocks = int64_t (*)(const Terms<T>&, const void* residual, uintptr_t ahead, void* out,
                                int64_t width);

// Null if the types differ, or the residual's elements are not next to each other.
template <typename T>
WriteBlocks<T> select_write_blocks(const Lookup& lookup, bool stream) {
  const TokenOperand& residual = lookup.activation;
  if constexpr (Packed<T>::kExists) {
    if (lookup.embedding_dtype != lookup.table.dtype) return nullptr;
    if (residual.present() && (residual.dtype != lookup.table.dtype || residual.last_stride != 1)) {
      return nullptr;
    }
    const auto select = [&](auto weighted, auto* of_residual) -> WriteBlocks<T> {
      using Residual = std::remove_pointer_t<decltype(of_residual)>;
      constexpr bool kWeighted = decltype(weighted)::value;
      return stream ? write_blocks<true, kWeighted, T, Residual>
                    : write_blocks<false, kWeighted, T, Residual>;
    };
    const auto select_residual = [&](auto weighted) {
      return residual.present() ? select(weighted, static_cast<T*>(nullptr))
                                : select(weighted, static_cast<None*>(nullptr));
    };
    return lookup.weights.present() ? select_residual(std::true_type())
                                    : select_residual(std::false_type());
  }
  return nullptr;
}

// ----- one token, any types --------------------------------------------------------------------

// sums[h] = the sum of the terms' columns column + h
template <typename Table>
void sum_terms(const Terms<Table>& terms, bool weighted, int64_t column, int64_t width,
               OpMath<Table>* sums) {
  using Math = OpMath<Table>;
  // -0 is what addition leaves everything as it is with: the sum starts from the first term.
  const Math start = terms.from_zero ? Math(0) : -Math(0);
  for (int64_t h = 0; h < width; ++h) sums[h] = start;
  for (int n = 0; n < terms.count; ++n) {
    const Table* row = terms.rows[n] + column;
    if (weighted) {
      const Math weight = terms.weights[n];
      for (int64_t h = 0; h < width; ++h) sums[h] += static_cast<Math>(row[h]) * weight;
    } else {
      for (int64_t h = 0; h < width; ++h) sums[h] += static_cast<Math>(row[h]);
    }
  }
}

// out[h] = residual[h] + round_to_Embedding(sums[h])
template <typename Math, typename Embedding, typename Residual>
void add_residual(const void* sums_data, const void* residual_data, int64_t stride, int64_t width,
                  void* out_data) {
  using Out = Promoted<Embedding, Residual>;
  const auto* sums = static_cast<const Math*>(sums_data);
  auto* __restrict out = static_cast<Out*>(out_data);
  const auto rounded = [&](int64_t h) {
    return static_cast<OpMath<Out>>(static_cast<Embedding>(sums[h]));
  };
  if constexpr (std::is_same_v<Residual, None>) {
    for (int64_t h = 0; h < width; ++h) out[h] = static_cast<Out>(rounded(h));
  } else {
    const auto* residual = static_cast<const Residual*>(residual_data);
    const auto add = [&](int64_t h, int64_t step) {
      return static_cast<Out>(rounded(h) + static_cast<OpMath<Out>>(residual[h * step]));
    };
    if (stride == 1) {
      for (int64_t h = 0; h < width; ++h) out[h] = add(h, 1);
    } else {
      for (int64_t h = 0; h < width; ++h) out[h] = add(h, stride);
    }
  }
}

using AddResidual = void (*)(const void* sums, const void* residual, int64_t stride, int64_t width,
                             void* out);

template <typename Math>
AddResidual select_add_residual(const Lookup& lookup) {
  return visit(lookup.embedding_dtype, [&](auto* embedding) -> AddResidual {
    using Embedding = std::remove_pointer_t<decltype(embedding)>;
    if (!lookup.activation.present()) return add_residual<Math, Embedding, None>;
    return visit(lookup.activation.dtype, [&](auto* residual) -> AddResidual {
      return add_residual<Math, Embedding, std::remove_pointer_t<decltype(residual)>>;
    });
  });
}

// ----- tokens ----------------------------------------------------------------------------------

// Fills the terms of a token. Returns the k of the first id that is too large, or -1.
template <typename Table>
int64_t find_terms(const Lookup& lookup, const TokenOffsets& offsets, Terms<Table>& terms) {
  const auto* table = lookup.table.data<const Table>();
  const bool padding = is_padding(lookup, offsets);
  terms.count = 0;
  terms.from_zero = lookup.weights.present();
  for (int64_t k = 0; k < lookup.num_entries; ++k) {
    const int64_t row = resolve_row(lookup, offsets, k, padding);
    if (row == kIdTooLarge) return k;
    if (row == kNoRow) {
      terms.from_zero = true;  // it adds +0, and wherever that stands it has the same effect
      continue;
    }
    terms.rows[terms.count] = table + k * lookup.table.entry_stride + row * lookup.table.row_stride;
    terms.weights[terms.count++] = read_weight(lookup, offsets, k);
  }
  return -1;
}

// Bytes from a token's residual or gradient to that of some tokens ahead, which may lie outside the
// tensor: a prefetch doesn't mind.
int64_t bytes_ahead(const Lookup& lookup) {
  if (lookup.num_token_dims == 0) return 0;
  return kTokensAhead * lookup.activation.token_strides[lookup.num_token_dims - 1] *
         element_size(lookup.activation.dtype);
}

template <typename Table>
int64_t forward_tokens(const Lookup& lookup, int64_t begin, int64_t end, bool stream) {
  using Math = OpMath<Table>;
  const WriteBlocks<Table> blocks = select_write_blocks<Table>(lookup, stream);
  const AddResidual finish = select_add_residual<Math>(lookup);
  const TokenOperand& residual = lookup.activation;
  const int64_t residual_size = element_size(residual.dtype);
  const int64_t out_size = element_size(lookup.out.dtype);
  const int64_t ahead = bytes_ahead(lookup);
  char* out = lookup.out.data<char>() + begin * lookup.num_columns * out_size;
  int64_t first_bad = -1;
  Terms<Table> terms;
  for (int64_t token = begin; token < end; ++token, out += lookup.num_columns * out_size) {
    const TokenOffsets offsets = token_offsets(lookup, token);
    const int64_t bad = find_terms(lookup, offsets, terms);
    if (bad >= 0) {
      if (first_bad < 0) first_bad = token * lookup.num_entries + bad;
      continue;
    }
    const char* from = nullptr;
    if (residual.present()) {
      from = residual.data<const char>() + offsets.activation * residual_size;
    }
    int64_t column = blocks == nullptr
                         ? 0
                         : blocks(terms, from, reinterpret_cast<uintptr_t>(from) + ahead, out,
                                  lookup.num_columns);
    if (from != nullptr) from += column * residual.last_stride * residual_size;
    Math sums[kChunk];
    for (int64_t width; column < lookup.num_columns; column += width) {
      width = lookup.num_columns - column < kChunk ? lookup.num_columns - column : kChunk;
      sum_terms(terms, lookup.weights.present(), column, width, sums);
      finish(sums, from, residual.last_stride, width, out + column * out_size);
      if (from != nullptr) from += width * residual.last_stride * residual_size;
    }
  }
#if CPU_VECTOR_BYTES > 16
  if (stream) _mm_sfence();  // before other threads read the result
#endif
  return first_bad;
}

int64_t forward(const Lookup& lookup, int64_t begin, int64_t end, bool stream) {
  return visit(lookup.table.dtype, [&](auto* table) {
    return forward_tokens<std::remove_pointer_t<decltype(table)>>(lookup, begin, end, stream);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace embedding_lookup

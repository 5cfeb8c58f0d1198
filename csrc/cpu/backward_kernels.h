// The CPU's backward, in two ways that give the same bits: a row's sum has one thread and one
// order, that of its entries' (token, k).
//
//   accumulate  reads the gradient once, in the order of the tokens, and adds to sums that stay in
//               the cache: for as many rows in use as fit there.
//   gather      reads it once an entry, in the order of the rows: for any number of them.
//
// No include guard: see kernels.h.

namespace embedding_lookup {
namespace CPU_CAPABILITY {
namespace {

// ----- sums ------------------------------------------------------------------------------------

// A block of a row's sum, in registers: float32 for a 16-bit T, in the order of T's blocks.
template <typename T>
struct BlockSum {
  Block block = {};

  void load(const float* from) { block = Packed<float>::load(from); }
  void save(float* to) const { Packed<float>::round_and_store<false>(to, block); }

  template <bool kWeighted>
  void add(const T* grad, float weight) {
    Block term = Packed<T>::load(grad);
    if constexpr (kWeighted) term.scale(weight);
    block.add(term);
  }
  template <bool kStream>
  void round_and_store(T* to) const {
    Packed<T>::template round_and_store<kStream>(to, block);
  }
};

// And float64 for float32.
template <>
struct BlockSum<float> {
  static constexpr int kParts = kBlock / kDoubles;
  // In registers only if GCC unrolls the loops over them before it looks for arrays to take apart.
  Doubles parts[kParts] = {};

  // One after the other, see Packed<float>::load.
  void load(const double* from) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      __builtin_memcpy(&parts[i], from + i * kDoubles, sizeof(Doubles));
    }
  }
  void save(double* to) const {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      __builtin_memcpy(to + i * kDoubles, &parts[i], sizeof(Doubles));
    }
  }

  template <bool kWeighted>
  void add(const float* grad, float weight) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      Doubles term = load_doubles(grad + i * kDoubles);
      if constexpr (kWeighted) term *= static_cast<double>(weight);
      parts[i] += term;
    }
  }
  template <bool kStream>
  void round_and_store(float* to) const {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      round_and_store_doubles<kStream>(to + i * kDoubles, parts[i]);
    }
  }
};

// Whether sums are kept, as far as whole blocks go, in the order of the blocks.
template <typename Table, typename Grad>
bool in_blocks(const Lookup& lookup) {
  return std::is_same_v<Table, Grad> && Packed<Table>::kExists &&
         lookup.activation.last_stride == 1;
}

// out[h] = sums[h], rounded
template <typename Table>
void store_sums(const Sum<Table>* sums, bool blocks, int64_t width, Table* __restrict out) {
  int64_t h = 0;
  if constexpr (Packed<Table>::kExists) {
    for (; blocks && h + kBlock <= width; h += kBlock) {
      BlockSum<Table> sum;
      sum.load(sums + h);
      sum.template round_and_store<false>(out + h);
    }
  }
  for (; h < width; ++h) out[h] = static_cast<Table>(sums[h]);
}

// sums[n][h] += weights[n] * grad[h]. No two of the N are of one row, which the compiler can't
// know.
template <int N, bool kWeighted, typename Table, typename Grad>
void add_to_sums(Sum<Table>* const* begin_of_sums, const float* weights, const Grad* grad,
                 int64_t stride, int64_t width) {
  using Acc = Sum<Table>;
  Acc* sums[N];
  for (int n = 0; n < N; ++n) sums[n] = begin_of_sums[n];
  int64_t h = 0;
  if constexpr (std::is_same_v<Grad, Table> && Packed<Grad>::kExists) {
    for (; stride == 1 && h + kBlock <= width; h += kBlock) {
      for (int n = 0; n < N; ++n) {
        BlockSum<Grad> sum;
        sum.load(sums[n] + h);
        sum.template add<kWeighted>(grad + h, kWeighted ? weights[n] : 1);
        sum.save(sums[n] + h);
      }
    }
  }
  const auto add = [&](int64_t h, int64_t step) {
    const Acc value = static_cast<OpMath<Grad>>(grad[h * step]);
    for (int n = 0; n < N; ++n) {
      sums[n][h] += kWeighted ? value * static_cast<Acc>(weights[n]) : value;
    }
  };
  if (stride != 1) {
    for (; h < width; ++h) add(h, stride);
  }
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (; h < width; ++h) add(h, 1);
}

// ----- accumulate ------------------------------------------------------------------------------

template <bool kWeighted, typename Table, typename Grad>
void accumulate_tokens(const Lookup& lookup, const int32_t* sum_of_entry, int64_t column,
                       int64_t width, Sum<Table>* sums) {
  const int64_t stride = lookup.activation.last_stride;
  const auto* grad = lookup.activation.data<const Grad>() + column * stride;
  const int64_t ahead = bytes_ahead(lookup);
  for (int64_t token = 0; token < lookup.num_tokens; ++token, sum_of_entry += lookup.num_entries) {
    Sum<Table>* begin_of_sums[kMaxEntries];
    float weights[kMaxEntries];
    const TokenOffsets offsets = token_offsets(lookup, token);
    int count = 0;
    for (int64_t k = 0; k < lookup.num_entries; ++k) {
      if (sum_of_entry[k] < 0) continue;
      if constexpr (kWeighted) weights[count] = read_weight(lookup, offsets, k);
      begin_of_sums[count++] = sums + sum_of_entry[k] * width;
    }
    if (count == 0) continue;
    const Grad* from = grad + offsets.activation;
    if (stride == 1) {
      const uintptr_t next = reinterpret_cast<uintptr_t>(from) + ahead;
      for (uintptr_t byte = 0; byte < width * sizeof(Grad); byte += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(next + byte));
      }
    }
    // Two at a time, unless they are the same row of a shared table.
    for (int n = 0; n < count;) {
      if (n + 1 < count && begin_of_sums[n] != begin_of_sums[n + 1]) {
        add_to_sums<2, kWeighted, Table>(begin_of_sums + n, weights + n, from, stride, width);
        n += 2;
      } else {
        add_to_sums<1, kWeighted, Table>(begin_of_sums + n, weights + n, from, stride, width);
        n += 1;
      }
    }
  }
}

// Calls f with null pointers to the types of the table and of the gradient.
template <typename F>
void visit_both(const Lookup& lookup, const F& f) {
  visit(lookup.table.dtype,
        [&](auto* table) { visit(lookup.activation.dtype, [&](auto* grad) { f(table, grad); }); });
}

void accumulate(const Lookup& lookup, const int32_t* sum_of_entry, int64_t column, int64_t width,
                void* sums) {
  visit_both(lookup, [&](auto* table, auto* grad) {
    using Table = std::remove_pointer_t<decltype(table)>;
    using Grad = std::remove_pointer_t<decltype(grad)>;
    const auto run = lookup.weights.present() ? accumulate_tokens<true, Table, Grad>
                                              : accumulate_tokens<false, Table, Grad>;
    run(lookup, sum_of_entry, column, width, static_cast<Sum<Table>*>(sums));
  });
}

void store(const Lookup& lookup, const void* sums, int64_t width, void* out) {
  visit_both(lookup, [&](auto* table, auto* grad) {
    using Table = std::remove_pointer_t<decltype(table)>;
    const bool blocks = in_blocks<Table, std::remove_pointer_t<decltype(grad)>>(lookup);
    store_sums<Table>(static_cast<const Sum<Table>*>(sums), blocks, width,
                      static_cast<Table*>(out));
  });
}

// ----- gather ----------------------------------------------------------------------------------

// Entries that are added up in registers at once: their gradients should fit the level 1 cache.
constexpr int64_t kGroup = 8;

// Columns whose sums wait in the level 1 cache for a run's next group.
constexpr int64_t kSumColumns = 1024;

// A run of entries: those of one row.
template <typename Grad>
struct Run {
  const Grad* grad;  // at the first column
  const int64_t* offsets;
  const float* weights;
  int64_t count;
};

// out[h] = the run's sum, for the columns that go in blocks. Returns how many those are.
template <bool kStream, bool kWeighted, typename T>
int64_t sum_run_blocks(const Run<T>& run, int64_t width, T* out) {
  alignas(64) Sum<T> sums[kSumColumns];
  const int64_t columns = width / kBlock * kBlock;
  for (int64_t begin = 0; begin < run.count; begin += kGroup) {
    const int64_t end = run.count - begin < kGroup ? run.count : begin + kGroup;
    for (int64_t h = 0; h < columns; h += kBlock) {
      BlockSum<T> sum;
      if (begin > 0) sum.load(sums + h);
      for (int64_t n = begin; n < end; ++n) {
        const float weight = kWeighted ? run.weights[n] : 1;
        sum.template add<kWeighted>(run.grad + run.offsets[n] + h, weight);
      }
      if (end == run.count) {
        sum.template round_and_store<kStream>(out + h);
      } else {
        sum.save(sums + h);
      }
    }
  }
  return columns;
}

// out[h] = the run's sum
template <bool kWeighted, typename Table, typename Grad>
void sum_run(const Lookup& lookup, const Run<Grad>& run, int64_t width, Table* out) {
  using Acc = Sum<Table>;
  const int64_t stride = lookup.activation.last_stride;
  Acc sums[kSumColumns];
  for (int64_t h = 0; h < width; ++h) sums[h] = 0;
  for (int64_t n = 0; n < run.count; ++n) {
    Acc* const begin_of_sums[1] = {sums};
    const float weight = kWeighted ? run.weights[n] : 1;
    add_to_sums<1, kWeighted, Table>(begin_of_sums, &weight, run.grad + run.offsets[n], stride,
                                     width);
  }
  store_sums<Table>(sums, in_blocks<Table, Grad>(lookup), width, out);
}

template <bool kWeighted, typename Table, typename Grad>
void gather_row(const Lookup& lookup, const Run<Grad>& whole, int64_t column, int64_t end_column,
                Table* out, bool stream) {
  const int64_t stride = lookup.activation.last_stride;
  for (int64_t width; column < end_column; column += width) {
    width = end_column - column < kSumColumns ? end_column - column : kSumColumns;
    Run<Grad> run = whole;
    run.grad += column * stride;
    int64_t done = 0;
    if constexpr (std::is_same_v<Table, Grad> && Packed<Table>::kExists) {
      if (stride == 1) {
        done = stream ? sum_run_blocks<true, kWeighted>(run, width, out + column)
                      : sum_run_blocks<false, kWeighted>(run, width, out + column);
      }
    }
    run.grad += done * stride;
    if (done < width) {
      sum_run<kWeighted>(lookup, run, width - done, out + column + done);
    }
  }
}

void clear(void* out, int64_t bytes, [[maybe_unused]] bool stream) {
  auto* to = static_cast<char*>(out);
#if CPU_VECTOR_BYTES > 16
  if (stream) {
    while (bytes > 0 && reinterpret_cast<uintptr_t>(to) % CPU_VECTOR_BYTES != 0) {
      *to++ = 0;
      --bytes;
    }
    for (; bytes >= CPU_VECTOR_BYTES; to += CPU_VECTOR_BYTES, bytes -= CPU_VECTOR_BYTES) {
      store_words<true>(to, Words{});
    }
  }
#endif
  if (bytes > 0) __builtin_memset(to, 0, bytes);
}

template <bool kWeighted, typename Table, typename Grad>
void gather_region(const Lookup& lookup, const SortedEntries& entries, const Region& region,
                   bool stream) {
  auto* table = lookup.table.data<Table>();
  const auto* grad = lookup.activation.data<const Grad>();
  const bool whole = region.end_column - region.column == lookup.num_columns;
  for (int64_t row = region.row; row < region.end_row; ++row) {
    Table* out = table + row * lookup.table.row_stride;
    const int64_t begin = entries.begin_of_row[row];
    const int64_t count = entries.begin_of_row[row + 1] - begin;
    if (count > 0) {
      const Run<Grad> run = {grad, entries.offsets + begin,
                             kWeighted ? entries.weights + begin : nullptr, count};
      gather_row<kWeighted>(lookup, run, region.column, region.end_column, out, stream);
      continue;
    }
    int64_t end = row + 1;
    while (whole && end < region.end_row && entries.begin_of_row[end + 1] == begin) ++end;
    const int64_t columns = (end - 1 - row) * lookup.table.row_stride + region.end_column;
    clear(out + region.column, (columns - region.column) * sizeof(Table), stream);
    row = end - 1;
  }
#if CPU_VECTOR_BYTES > 16
  if (stream) _mm_sfence();  // before other threads read the result
#endif
}

void gather(const Lookup& lookup, const SortedEntries& entries, const Region& region, bool stream) {
  visit_both(lookup, [&](auto* table, auto* grad) {
    using Table = std::remove_pointer_t<decltype(table)>;
    using Grad = std::remove_pointer_t<decltype(grad)>;
    const auto run = lookup.weights.present() ? gather_region<true, Table, Grad>
                                              : gather_region<false, Table, Grad>;
    run(lookup, entries, region, stream);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace embedding_lookup

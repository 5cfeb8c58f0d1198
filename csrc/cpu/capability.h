// The seam between the launchers and the instruction sets: one CpuKernels for each.

#pragma once

#include <cstdint>

#include "embedding_lookup.h"
#include "pixel_scaling.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EMBEDDING_LOOKUP_X86_DISPATCH 1
#endif

namespace embedding_lookup {

// The type of the backward's sums. float64 for a float32 table keeps a sum of thousands of terms
// within one unit in the last place; the sums stay in the cache, so no more goes to memory for it.
inline int64_t sum_size(ScalarType table_dtype) { return element_size(table_dtype) == 2 ? 4 : 8; }

// The row of its axis's table that an entry reads: here alone padding, padding_id and ids below
// zero are resolved. Or kNoRow; or kIdTooLarge, which is an error, whether the token is `padding`
// or not.
constexpr int64_t kNoRow = -1;
constexpr int64_t kIdTooLarge = -2;
inline int64_t resolve_row(const Lookup& lookup, const TokenOffsets& offsets, int64_t k,
                           bool padding) {
  const int64_t id = read_id(lookup, offsets, k);
  if (lookup.has_padding_id && id == lookup.padding_id) return kNoRow;
  if (id >= lookup.num_rows) return kIdTooLarge;
  if (padding) return kNoRow;
  return id < 0 ? 0 : id;
}

// The entries of a backward in the order of their rows, those of a row by (token, k).
struct SortedEntries {
  const int64_t* begin_of_row;  // [total_rows + 1] where each row's entries begin
  const int64_t* offsets;       // [entries] of an entry's gradient, in elements
  const float* weights;         // [entries], if there are any
};

// A rectangle of the table's gradient.
struct Region {
  int64_t row;
  int64_t end_row;
  int64_t column;
  int64_t end_column;
};

// What the launchers call, one set per instruction set.
struct CpuKernels {
  // The name that ATEN_CPU_CAPABILITY and torch.backends.cpu.get_cpu_capability() use, lower case.
  const char* name;

  // The forward of tokens [begin, end). Returns the number (token * K + k) of the first entry whose
  // id is too large, whose token is left unwritten, or -1. `stream`: write the result past the
  // caches, which takes an output whose tokens start at multiples of 64 bytes.
  int64_t (*forward)(const Lookup& lookup, int64_t begin, int64_t end, bool stream);

  // Adds columns [column, column + width) of the gradient to `sums` [rows in use, width]: token
  // t's, times its weights, to those with the numbers sum_of_entry[t * K + k] that are not -1.
  void (*accumulate)(const Lookup& lookup, const int32_t* sum_of_entry, int64_t column,
                     int64_t width, void* sums);

  // Rounds a row's sums to the table's dtype.
  void (*store)(const Lookup& lookup, const void* sums, int64_t width, void* out);

  // Writes a region of the table's gradient, each row from the entries that read it. `stream` as
  // above.
  void (*gather)(const Lookup& lookup, const SortedEntries& entries, const Region& region,
                 bool stream);

  // Writes zeros. `stream` as above, but from any address.
  void (*clear)(void* out, int64_t bytes, bool stream);

  // The third op's elements [begin, end). `stream` as for the forward.
  void (*scale)(const Scaling& scaling, int64_t begin, int64_t end, bool stream);
};

extern const CpuKernels kBaseline;
#ifdef EMBEDDING_LOOKUP_X86_DISPATCH
extern const CpuKernels kAvx2;
extern const CpuKernels kAvx512;
#endif

// Those of this CPU.
const CpuKernels& kernels();

// A fresh result's pages cost several times what writing it does. Asking for huge ones, as
// PyTorch's allocator does with THP_MEM_ALLOC_ENABLE=1, saves most of that. It is advice: whether
// it is taken changes nothing but the time.
void advise_huge_pages(void* data, int64_t bytes);

// Has the system make all pages of what is about to be written at once, which takes it half of what
// a fault for each of them does. Where there are huge pages it changes nothing. Advice, too.
// Only for results of kFreshBytes or more: glibc's malloc maps those anew each time, where smaller
// ones are mostly memory that was there before, of which to look at each page costs more than it
// saves.
constexpr int64_t kFreshBytes = int64_t{32} << 20;
void populate(void* data, int64_t bytes);

// Elements below which a thread is not worth waking.
constexpr int64_t kGrainElements = 32768;

// With an input as large, a result of this size has no place in the level 3 cache that a few cores
// share on most CPUs, so it is written past the caches. (The size that the system reports is no
// guide: on a virtual machine it is all of the host's.)
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// Becomes an IndexError in Python.
[[noreturn]] void throw_id_too_large(const Lookup& lookup, int64_t entry);

}  // namespace embedding_lookup

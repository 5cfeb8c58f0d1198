// The seam between launch.cpp and the instruction sets: one CpuKernels for each, and the walk over
// the tokens that both sides share.

#pragma once

#include <cstdint>

#include "embedding_lookup.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EMBEDDING_LOOKUP_X86_DISPATCH 1
#endif

namespace embedding_lookup {

// What launch.cpp calls, one set per instruction set.
struct CpuKernels {
  // The name that ATEN_CPU_CAPABILITY and torch.backends.cpu.get_cpu_capability() use, lower case.
  const char* name;

  // The forward of tokens [begin, end). Returns the position (token * K + axis) of the first id
  // that is too large, whose token is left unwritten, or -1. `stream`: write the result past the
  // caches, which takes rows that start at multiples of 64 bytes.
  int64_t (*forward)(const Forward& params, int64_t begin, int64_t end, bool stream);

  // Adds columns [column, column + width) of the gradient to `sums` [slots, width]: token t is
  // added to the rows slots[t * K + axis] that are not -1. The sums are float32 for a 16-bit table,
  // else float64.
  void (*accumulate)(const Backward& params, const int32_t* slots, int64_t column, int64_t width,
                     void* sums);

  // Rounds a row of sums to the table's dtype.
  void (*store)(const Backward& params, const void* sums, int64_t width, void* out);
};

extern const CpuKernels kBaseline;
#ifdef EMBEDDING_LOOKUP_X86_DISPATCH
extern const CpuKernels kAvx2;
extern const CpuKernels kAvx512;
#endif

// Walks the tokens in order, keeping the element offset of each tensor.
struct TokenCursor {
  const Lookup& lookup;
  int64_t index[kMaxTokenDims];
  int64_t ids = 0;
  int64_t padding = 0;
  int64_t rows = 0;

  TokenCursor(const Lookup& lookup, int64_t token) : lookup(lookup) {
    for (int dim = lookup.num_token_dims - 1; dim >= 0; --dim) {
      index[dim] = token % lookup.token_sizes[dim];
      token /= lookup.token_sizes[dim];
      ids += index[dim] * lookup.ids_strides[dim];
      padding += index[dim] * lookup.padding_strides[dim];
      rows += index[dim] * lookup.rows_strides[dim];
    }
  }

  void next() {
    for (int dim = lookup.num_token_dims - 1; dim >= 0; --dim) {
      ids += lookup.ids_strides[dim];
      padding += lookup.padding_strides[dim];
      rows += lookup.rows_strides[dim];
      if (++index[dim] < lookup.token_sizes[dim]) return;
      index[dim] = 0;
      ids -= lookup.ids_strides[dim] * lookup.token_sizes[dim];
      padding -= lookup.padding_strides[dim] * lookup.token_sizes[dim];
      rows -= lookup.rows_strides[dim] * lookup.token_sizes[dim];
    }
  }

  int64_t id(int64_t axis) const {
    const int64_t offset = ids + axis * lookup.ids_axis_stride;
    return lookup.ids_are_int64 ? static_cast<const int64_t*>(lookup.ids)[offset]
                                : static_cast<const int32_t*>(lookup.ids)[offset];
  }

  // The table row that this token reads on an axis, or -1 for none. It is up to the caller to
  // reject rows >= num_rows.
  int64_t row(int64_t axis) const {
    const int64_t value = id(axis);
    if (lookup.has_padding_id && value == lookup.padding_id) return -1;
    return value < 0 ? 0 : value;
  }

  bool is_padding() const { return lookup.padding != nullptr && lookup.padding[padding]; }
};

}  // namespace embedding_lookup

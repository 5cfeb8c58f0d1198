// What the forward and the backward share on Metal: vectors, the way from a token to its elements,
// the entries of a token, and errors.

#pragma once

#include <metal_stdlib>

// Metal's default, fast math, may reorder sums, fuse a product into one, and take it that there
// are no NaNs. Said before the headers that compute.
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)

#include "arguments.h"

// For the loops over arrays: one that stays a loop keeps its array in memory.
#define UNROLL _Pragma("clang loop unroll(full)")

using namespace metal;
using namespace embedding_lookup_metal;

// ---------------------------------------------------------------------------------------------
// Vectors of N elements, N = 1 or kVectorWidth. They stay as they are loaded until they are asked
// for, so that nothing waits before all of a batch are on their way.

template <typename T, int N>
struct Vector {
  using Elements = vec<T, N>;
  Elements elements;

  METAL_FUNC float get(int i) const { return static_cast<float>(elements[i]); }
  METAL_FUNC void set(int i, float value) { elements[i] = static_cast<T>(value); }  // rounds
};
template <typename T>
struct Vector<T, 1> {
  using Elements = T;
  Elements elements;

  METAL_FUNC float get(int) const { return static_cast<float>(elements); }
  METAL_FUNC void set(int, float value) { elements = static_cast<T>(value); }
};

template <int N, typename T>
METAL_FUNC Vector<T, N> load(device const T* address) {
  using Elements = typename Vector<T, N>::Elements;
  return {*reinterpret_cast<device const Elements*>(address)};
}
template <typename T, int N>
METAL_FUNC void store(device T* address, Vector<T, N> vector) {
  using Elements = typename Vector<T, N>::Elements;
  *reinterpret_cast<device Elements*>(address) = vector.elements;
}

// ---------------------------------------------------------------------------------------------
// Errors. They surface when PyTorch next synchronises with the stream.

struct ErrorMessages {
  atomic_uint count;
  ErrorMessage messages[kMaxErrors];
};

// Long division of 16-bit limbs: the GPU divides no 64-bit integers. Returns the remainder.
METAL_FUNC uint divide_by_ten(thread uint64_t& number) {
  uint remainder = 0;
  uint64_t quotient = 0;
  for (int shift = 48; shift >= 0; shift -= 16) {
    const uint limb = remainder << 16 | static_cast<uint>(number >> shift & 0xffff);
    quotient = quotient << 16 | limb / 10;
    remainder = limb % 10;
  }
  number = quotient;
  return remainder;
}

// Writes text into one message.
struct ErrorWriter {
  device char* next;

  METAL_FUNC void write(constant const char* text) {
    for (; *text != 0; ++text) *next++ = *text;
  }
  METAL_FUNC void write(uint64_t number) {
    int length = 0;
    uint64_t rest = number;
    do {
      divide_by_ten(rest);
      ++length;
    } while (rest != 0);
    for (int i = length - 1; i >= 0; --i) next[i] = static_cast<char>('0' + divide_by_ten(number));
    next += length;
  }
};

constant constexpr char kErrorName[] = "fused_embedding_lookup";
constant constexpr char kErrorIds[] = ": position_ids must be less than the ";
constant constexpr char kErrorGot[] = " rows of the table, got ";
constant constexpr char kErrorAxis[] = " on axis ";
constant constexpr char kErrorToken[] = " of token ";

// Takes one of the messages and writes what all of them say. Null if there is none left.
METAL_FUNC ErrorWriter begin_message(device ErrorMessages* errors) {
  const uint i = atomic_fetch_add_explicit(&errors->count, 1u, memory_order_relaxed);
  if (i >= kMaxErrors) return {nullptr};
  device ErrorMessage& error = errors->messages[i];
  ErrorWriter file{error.file}, function{error.function}, message{error.message};
  file.write(kErrorName);
  function.write(kErrorName);
  message.write(kErrorName);
  *file.next = *function.next = 0;
  error.line = 0;
  return message;
}

// By one thread: `text` says what is wrong. Here the compiler decides what is inlined.
inline void report(device ErrorMessages* errors, constant const char* text) {
  ErrorWriter message = begin_message(errors);
  if (message.next == nullptr) return;
  message.write(text);
  *message.next = 0;
}

// By one thread, of an id that is too large.
inline void report_id(device ErrorMessages* errors, int64_t num_rows, int64_t id, uint axis,
                      uint token) {
  ErrorWriter message = begin_message(errors);
  if (message.next == nullptr) return;
  message.write(kErrorIds);
  message.write(static_cast<uint64_t>(num_rows));
  message.write(kErrorGot);
  message.write(static_cast<uint64_t>(id));
  message.write(kErrorAxis);
  message.write(uint64_t(axis));
  message.write(kErrorToken);
  message.write(uint64_t(token));
  *message.next = 0;
}

// ---------------------------------------------------------------------------------------------
// Tokens.

// Where a token's elements begin in each tensor, in elements.
struct TokenOffsets {
  int64_t ids;
  int64_t weights;
  int64_t padding;
  int64_t activation;

  METAL_FUNC void add(constant Lookup& lookup, int dim, uint index) {
    ids += index * lookup.ids_strides[dim];
    weights += index * lookup.weights_strides[dim];
    padding += index * lookup.padding_strides[dim];
    activation += index * lookup.activation_strides[dim];
  }
};

// Without a division where the leading dimensions merged into one, as those of contiguous tensors
// do.
METAL_FUNC TokenOffsets token_offsets(constant Lookup& lookup, uint token) {
  TokenOffsets offsets = {0, 0, 0, 0};
  for (int dim = static_cast<int>(lookup.num_token_dims) - 1; dim > 0; --dim) {
    const uint size = lookup.token_sizes[dim];
    offsets.add(lookup, dim, token % size);
    token /= size;
  }
  if (lookup.num_token_dims > 0) offsets.add(lookup, 0, token);
  return offsets;
}

METAL_FUNC bool is_padding(constant Lookup& lookup, device const bool* padding,
                           TokenOffsets offsets) {
  return lookup.has_padding != 0 && padding[offsets.padding];
}

// ---------------------------------------------------------------------------------------------
// Entries.

constant constexpr int64_t kNoRow = -1;

METAL_FUNC int64_t load_id(constant Lookup& lookup, device const void* ids, TokenOffsets offsets,
                           uint k) {
  const int64_t offset = offsets.ids + k * lookup.ids_last_stride;
  return lookup.ids_are_int64 != 0 ? static_cast<device const int64_t*>(ids)[offset]
                                   : static_cast<device const int32_t*>(ids)[offset];
}

// The row of its table that entry k of a token reads, or kNoRow: here alone padding, padding_id and
// ids below zero are resolved. Too large an id is an error, in padding too, and never an address.
METAL_FUNC int64_t resolve_row(constant Lookup& lookup, int64_t id, bool padding, uint k,
                               uint token, device ErrorMessages* errors) {
  if (lookup.has_padding_id != 0 && id == lookup.padding_id) return kNoRow;
  if (id >= lookup.num_rows) {
    report_id(errors, lookup.num_rows, id, k, token);
    return kNoRow;
  }
  if (padding) return kNoRow;
  return id < 0 ? 0 : id;
}

METAL_FUNC float read_weight(constant Lookup& lookup, device const float* weights,
                             TokenOffsets offsets, uint k) {
  return lookup.has_weights != 0 ? weights[offsets.weights + k * lookup.weights_last_stride] : 1.0f;
}

// ---------------------------------------------------------------------------------------------
// What the lanes of a simdgroup tell each other.

METAL_FUNC uint vote(bool predicate) {
  return static_cast<uint>(static_cast<simd_vote::vote_t>(simd_ballot(predicate)));
}

// The value of another lane.
METAL_FUNC int64_t shuffle(int64_t value, uint lane) {
  return as_type<int64_t>(simd_shuffle(as_type<uint2>(value), static_cast<ushort>(lane)));
}
METAL_FUNC uint shuffle(uint value, uint lane) {
  return simd_shuffle(value, static_cast<ushort>(lane));
}
METAL_FUNC float shuffle(float value, uint lane) {
  return simd_shuffle(value, static_cast<ushort>(lane));
}

// What the host hands to the shaders: one header for both compilers, so that the layouts and the
// buffers' indices are stated once. What the fields mean is in embedding_lookup.h.

#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#else
#include <cstdint>
#endif

namespace embedding_lookup_metal {

// Metal takes no constants at this scope that both compilers would.
enum : uint32_t {
  kMaxAxes = 4,
  kMaxTokenDims = 8,
  kSimdWidth = 32,     // of every Apple GPU
  kVectorWidth = 4,    // columns that a thread handles at once where the alignment lets it
  kTile = 1024,        // tokens that the backward sorts together
  kSumSimdgroups = 8,  // that share a row of the table's gradient
};

// Of the setBuffer calls and the [[buffer(n)]] attributes.
enum BufferIndex {
  kLookup,
  kIds,
  kPadding,
  kForward,   // forward
  kTable,     // forward
  kResidual,  // forward
  kOut,       // forward
  kSegments,  // backward, both steps
  kOrder,     // backward, both steps
  kBackward,  // backward, sums
  kGrad,      // backward, sums
  kGradTable  // backward, sums
};

// Tensors begin where their buffer is bound. All strides count elements.
struct Lookup {
  int64_t ids_strides[kMaxTokenDims];
  int64_t padding_strides[kMaxTokenDims];
  int64_t rows_strides[kMaxTokenDims];
  int64_t ids_axis_stride;
  int64_t padding_id;
  int64_t num_rows;
  uint32_t token_sizes[kMaxTokenDims];
  uint32_t num_token_dims;
  uint32_t num_tokens;
  uint32_t num_axes;
  uint32_t hidden;
  uint32_t ids_are_int64;
  uint32_t has_padding;
  uint32_t has_padding_id;
};

struct Forward {
  int64_t table_axis_stride;
  int64_t table_row_stride;
  int64_t residual_hidden_stride;
  uint32_t has_residual;
};

struct Backward {
  int64_t grad_hidden_stride;
  uint32_t num_tiles;
};

}  // namespace embedding_lookup_metal

// What the host hands to the shaders: one header for both compilers, so that the layouts and the
// buffers' indices are stated once. What the fields mean is in embedding_lookup.h.

#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#else
#include <cstdint>
#endif

#include "../interpolation_formula.h"

namespace embedding_lookup_metal {

// Metal takes no constants at this scope that both compilers would.
enum : uint32_t {
  kMaxEntries = 64,
  kMaxTokenDims = 8,
  kSimdWidth = 32,     // of every Apple GPU
  kVectorWidth = 4,    // columns that a thread handles at once where the alignment lets it
  kMaxThreads = 1024,  // of a threadgroup
  kScaledVectors = 4   // pixels of a thread that are in flight at once, in vectors
};

// Of the backward.
enum : uint32_t {
  kTile = 4096,                      // entries that are sorted together
  kMinRun = 8,                       // for K = 1, see Backward
  kPiece = 256,                      // a piece is shorter than twice this
  kTileParts = 16,                   // threadgroups that share a tile's pieces
  kSortMemory = kTile * 6 + 32 * 8,  // bytes: rows, entries, and two counts for each simdgroup
};

// Of the setBuffer calls and the [[buffer(n)]] attributes.
enum BufferIndex {
  kLookup,
  kIds,
  kWeights,
  kPadding,
  kErrors,
  // Forward.
  kForward,
  kTable,
  kResidual,
  kOut,
  // Backward.
  kBackward,
  kGrad,
  kGradTable,
  kOrder,
  kPieces,
  kNumPieces,
  kPartials,
  kAddends,
  kNumAddends,
  kMerged,
  kNumMerged,
  kStarts,
  // Interpolation.
  kInterpolation,
  kGrid,
  kPatchIds,
  kPatchWeights,
  // Scaling.
  kScaling,
  kPixels,
  kScaled
};

// Tensors begin where their buffer is bound. All strides count elements.
struct Lookup {
  int64_t ids_strides[kMaxTokenDims];
  int64_t weights_strides[kMaxTokenDims];
  int64_t padding_strides[kMaxTokenDims];
  int64_t activation_strides[kMaxTokenDims];
  int64_t ids_last_stride;
  int64_t weights_last_stride;
  int64_t activation_last_stride;
  int64_t padding_id;
  int64_t num_rows;
  uint32_t token_sizes[kMaxTokenDims];
  uint32_t num_token_dims;
  uint32_t num_tokens;
  uint32_t num_entries;
  uint32_t num_columns;
  uint32_t ids_are_int64;
  uint32_t has_weights;
  uint32_t has_padding;
  uint32_t has_padding_id;
};

enum Rounding : uint32_t { kToFloat, kToHalf, kToBfloat };

struct Forward {
  int64_t table_entry_stride;
  int64_t table_row_stride;
  Rounding embedding;  // what the sum is rounded to
  uint32_t has_residual;
};

struct Backward {
  uint32_t rows_per_entry;
  uint32_t total_rows;
  uint32_t num_tiles;
  uint32_t tile_entries;   // of whole tokens: kTile, or a little less
  uint32_t list_tiles;     // tiles whose addends are one sorted list by now
  uint32_t min_run;        // shorter runs of a tile have no partial: their entries are addends
  uint32_t tile_partials;  // of a tile at most
};

// Entries begin .. begin + length of a tile's order, which read one row.
struct Piece {
  uint16_t begin;
  uint16_t length;
};

// What a row's gradient is a sum of: a partial, or one entry's weight times its token's gradient.
struct Addend {
  uint32_t row;
  uint32_t index;  // of the partial; or of the entry, plus the number of partials there may be
};

struct Interpolation {
  int64_t grid_strides[2];
  embedding_lookup::Resampling resampling;
  uint32_t num_images;
  uint32_t num_patches;
  uint32_t grid_is_int64;
};

struct Scaling {
  int64_t num_vectors;
};

// PyTorch's, as in c10/metal/error.h, which the builder's Metal compiler doesn't find.
struct ErrorMessage {
  char file[128];
  char function[128];
  char message[250];
  uint32_t line;
};
enum : uint32_t { kMaxErrors = 30 };

}  // namespace embedding_lookup_metal

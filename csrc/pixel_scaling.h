// The third op's contract: what stands before Gemma 4's patch projection, in one pass.
//
//   out[i] = round_to_out( 2 * round_to_pixels( pixels[i] - 0.5 ) )
//
// The difference and the product are computed in float32 (float64 for float64 pixels) and each is
// rounded to the pixels' dtype, as in the code it replaces (transformers,
// Gemma4VisionPatchEmbedder): the results are the same bits.

#pragma once

#include <cstdint>

#include "embedding_lookup.h"

namespace embedding_lookup {

struct Scaling {
  int64_t count;   // of elements
  Operand pixels;  // contiguous
  Operand out;     // contiguous, uninitialised
};

// Defined once per device folder. There are elements.
void launch_scaling(const Scaling& scaling, torch::stable::Device device);

}  // namespace embedding_lookup

// The tensors whose memory the op has asked for.

#pragma once

#include <cstddef>

namespace simt {

// The size of the storage that begins at `address`, or 0 if none of those tensors' does.
size_t storage_bytes(const void* address);

}  // namespace simt

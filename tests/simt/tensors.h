// The tensors whose memory the op has asked for.

#pragma once

#include <cstddef>

namespace simt {

// The size of the storage that begins at `address`, or 0 if none of those tensors' does.
size_t storage_bytes(const void* address);

// From now on, tensors that this thread's op lets go of stay, until they are released: as their
// buffers do on a device that works through its commands later.
void hold_tensors();
void release_tensors();

// Called, if set, before the op hands on a tensor: its result, or one that PyTorch works on.
extern void (*before_tensor_is_handed_on)();

}  // namespace simt

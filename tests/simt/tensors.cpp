// An ear on the tensors whose memory the op takes: kernels may touch that memory and no other. The
// linker sends the extension's calls here (-Wl,--wrap).

#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "simt.h"

namespace {

struct Storage {
  AtenTensorHandle owner;
  const void* begin;
  size_t bytes;
};
std::mutex storages_mutex;
std::vector<Storage> storages;

thread_local bool holding = false;
thread_local std::vector<AtenTensorHandle> held;

// Lets kernels touch the bytes that a tensor's elements lie in, gaps included.
void add_tensor(AtenTensorHandle tensor, const void* data, bool writable) {
  int32_t dtype;
  int64_t dim, numel, offset, storage_bytes, *sizes, *strides;
  aoti_torch_get_dtype(tensor, &dtype);
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_numel(tensor, &numel);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_storage_size(tensor, &storage_bytes);
  if (numel == 0) return;
  const auto element_size = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  int64_t last = 0;
  for (int64_t i = 0; i < dim; ++i) last += (sizes[i] - 1) * strides[i];
  simt::add_memory(tensor, data, (last + 1) * element_size, writable);
  const std::lock_guard<std::mutex> lock(storages_mutex);
  storages.push_back({tensor, static_cast<const char*>(data) - offset * element_size,
                      static_cast<size_t>(storage_bytes)});
}

}  // namespace

namespace simt {

size_t storage_bytes(const void* address) {
  const std::lock_guard<std::mutex> lock(storages_mutex);
  for (const Storage& storage : storages) {
    if (storage.begin == address) return storage.bytes;
  }
  return 0;
}

void (*before_tensor_is_handed_on)() = nullptr;

void hold_tensors() { holding = true; }

void release_tensors() {
  holding = false;
  std::vector<AtenTensorHandle> tensors;
  tensors.swap(held);
  for (AtenTensorHandle tensor : tensors) aoti_torch_delete_tensor_object(tensor);
}

}  // namespace simt

extern "C" {

AOTITorchError __real_aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* copy);
AOTITorchError __wrap_aoti_torch_new_tensor_handle(AtenTensorHandle tensor,
                                                   AtenTensorHandle* copy) {
  if (simt::before_tensor_is_handed_on != nullptr) simt::before_tensor_is_handed_on();
  return __real_aoti_torch_new_tensor_handle(tensor, copy);
}

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (error == AOTI_TORCH_SUCCESS) add_tensor(tensor, *data, false);
  return error;
}

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (error == AOTI_TORCH_SUCCESS) add_tensor(tensor, *data, true);
  return error;
}

AOTITorchError __real_aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError __wrap_aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  {
    const std::lock_guard<std::mutex> lock(storages_mutex);
    storages.erase(std::remove_if(storages.begin(), storages.end(),
                                  [&](const Storage& storage) { return storage.owner == tensor; }),
                   storages.end());
  }
  if (holding) {
    held.push_back(tensor);
    return AOTI_TORCH_SUCCESS;
  }
  simt::drop_memory(tensor);
  return __real_aoti_torch_delete_tensor_object(tensor);
}

}  // extern "C"

// What the CUDA variant finds outside of its own sources when it runs on the engine: the CUDA
// runtime, the parts of torch that only a CUDA build has, and an ear on the tensors whose memory it
// takes.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>
#include <mutex>

#include "cuda_runtime.h"

uint4 dynamic_shared_memory[kMaxSharedBytes / sizeof(uint4)];

size_t& cuda_max_shared_bytes(const void* kernel) {
  static std::mutex mutex;
  static std::map<const void*, size_t> bytes;
  const std::lock_guard<std::mutex> lock(mutex);
  return bytes.emplace(kernel, kDefaultSharedBytes).first->second;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

namespace {

// Lets kernels touch the bytes that a tensor's elements lie in, gaps included.
void add_tensor(AtenTensorHandle tensor, const void* data, bool writable) {
  int32_t dtype;
  int64_t dim, numel, *sizes, *strides;
  aoti_torch_get_dtype(tensor, &dtype);
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_numel(tensor, &numel);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  if (numel == 0) return;
  int64_t last = 0;
  for (int64_t i = 0; i < dim; ++i) last += (sizes[i] - 1) * strides[i];
  simt::add_memory(tensor, data, (last + 1) * aoti_torch_dtype_element_size(dtype), writable);
}

}  // namespace

// The linker sends the extension's calls here (-Wl,--wrap).
extern "C" {

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
  simt::drop_memory(tensor);
  return __real_aoti_torch_delete_tensor_object(tensor);
}

void __real___assert_fail(const char*, const char*, unsigned, const char*);
void __wrap___assert_fail(const char* expression, const char* file, unsigned line,
                          const char* function) {
  if (simt::in_kernel()) simt::fail("device-side assert triggered: %s", expression);
  __real___assert_fail(expression, file, line, function);
}

}  // extern "C"

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

}  // extern "C"

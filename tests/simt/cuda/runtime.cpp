// What the CUDA variant finds outside of its own sources when it runs on the engine: the CUDA
// runtime, and the parts of torch that only a CUDA build has.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "cuda_runtime.h"

uint4 dynamic_shared_memory[kMaxSharedBytes / sizeof(uint4)];
bool refuses_launches = false;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

extern "C" {

// For the tests: whether launches are refused, and what CUDA would say was the last error.
__attribute__((visibility("default"))) void cuda_refuse_launches(bool refuse) {
  refuses_launches = refuse;
}
__attribute__((visibility("default"))) int cuda_last_error() { return cudaPeekAtLastError(); }

// The linker sends the extension's calls here (-Wl,--wrap).
void __real___assert_fail(const char*, const char*, unsigned, const char*);
void __wrap___assert_fail(const char* expression, const char* file, unsigned line,
                          const char* function) {
  if (simt::in_kernel()) simt::fail("device-side assert triggered: %s", expression);
  __real___assert_fail(expression, file, line, function);
}

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

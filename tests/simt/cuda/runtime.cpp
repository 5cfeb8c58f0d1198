// What the CUDA variant finds outside of its own sources when it runs on the engine: the CUDA
// runtime, and the parts of torch that only a CUDA build has.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "cuda_runtime.h"

uint4 dynamic_shared_memory[kMaxSharedBytes / sizeof(uint4)];

extern "C" {

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

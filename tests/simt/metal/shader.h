// How a shader gets its arguments: the calls that reflect.py generates, and what they ask.

#pragma once

#include <cstddef>
#include <cstdint>

#include "../simt.h"

namespace simt_metal {

// What is bound when a shader is dispatched.
const void* bound_buffer(uint32_t index, size_t size);  // `size` of a reference's type, or 0
void* bound_threadgroup_memory(uint32_t index);

// The arguments are the host's own memory, which the engine would take exception to.
#define SIMT_HOST __attribute__((no_sanitize("thread")))

// Becomes whatever pointer the shader's parameter is.
struct Pointer {
  void* address;
  template <typename T>
  SIMT_HOST operator T*() const {
    return static_cast<T*>(address);
  }
};
struct Reference {
  uint32_t index;
  template <typename T>
  SIMT_HOST operator const T&() const {
    return *static_cast<const T*>(bound_buffer(index, sizeof(T)));
  }
};

SIMT_HOST inline Pointer buffer_pointer(uint32_t index) {
  return {const_cast<void*>(bound_buffer(index, 0))};
}
SIMT_HOST inline Reference buffer_reference(uint32_t index) { return {index}; }
SIMT_HOST inline Pointer threadgroup_pointer(uint32_t index) {
  return {bound_threadgroup_memory(index)};
}

// A function of the library: its name, and the indices at which it wants a buffer.
struct Shader {
  const char* name;
  void (*run)(const void*);
  uint64_t buffers;  // a bit each
  bool takes_threadgroup_memory;
  bool takes_turns;  // asks how many threadgroups there are
};

// Adds the functions of one source to the library. Returns 0.
int add_shaders(const Shader* shaders, size_t num_shaders);

}  // namespace simt_metal

// Launches of tiny shaders, for the engine's own tests: right ones, and others that are wrong in
// one way. What Metal or PyTorch would abort on ends the process, what a shader does wrong is an
// exception. See test_engine.py.

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <ATen/mps/MPSStream.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "../metal/metallib.h"
#include "../simt.h"
#include "../tensors.h"

namespace {

constexpr unsigned kWords = 256;
alignas(16) uint32_t buffer[kWords];
bool holding = false;

}  // namespace

// In place of tensors.cpp: the one buffer there is.
namespace simt {
size_t storage_bytes(const void* address) { return address == buffer ? sizeof(buffer) : 0; }
void hold_tensors() { holding = true; }
void release_tensors() { holding = false; }
void (*before_tensor_is_handed_on)() = nullptr;
}  // namespace simt

extern "C" void metal_set_max_threadgroups(unsigned threadgroups);

namespace {

struct Params {
  uint32_t count = kWords;
  uint32_t summand = 1;
};

id<MTLComputePipelineState> make_pipeline(id<MTLDevice> device, const std::string& name) {
  id<MTLLibrary> library = simt_metal::createLibrary(device, nullptr);
  id<MTLFunction> function =
      [library newFunctionWithName:[NSString stringWithUTF8String:name.c_str()]];
  id<MTLComputePipelineState> pipeline = [device newComputePipelineStateWithFunction:function
                                                                               error:nullptr];
  [function release];
  [library release];
  return pipeline;
}

id<MTLComputePipelineState> pipeline(id<MTLDevice> device, const std::string& name) {
  static std::map<std::string, id<MTLComputePipelineState>> pipelines;
  id<MTLComputePipelineState>& pipeline = pipelines[name];
  if (pipeline == nil) pipeline = make_pipeline(device, name);
  return pipeline;
}

// Calls act(stream) where the stream may be used.
template <typename Act>
void on_stream(const Act& act) {
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  dispatch_sync(stream->queue(), ^{
    @autoreleasepool {
      act(stream);
    }
  });
}

struct Dispatch {
  std::string shader = "add";
  const void* bound = buffer;  // or null
  NSUInteger offset = 0;
  NSUInteger param_bytes = sizeof(Params);
  NSUInteger threadgroups = 2;
  NSUInteger threads = 64;
  NSUInteger memory_bytes = 0;
};

void encode(at::mps::MPSStream* stream, const Dispatch& dispatch) {
  const Params params[2];
  id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();
  [encoder setComputePipelineState:pipeline(stream->device(), dispatch.shader)];
  if (dispatch.bound != nullptr) {
    [encoder setBuffer:(id<MTLBuffer>)dispatch.bound offset:dispatch.offset atIndex:0];
  }
  [encoder setBytes:params length:dispatch.param_bytes atIndex:1];
  if (dispatch.memory_bytes > 0) {
    [encoder setThreadgroupMemoryLength:dispatch.memory_bytes atIndex:0];
  }
  [encoder dispatchThreadgroups:MTLSizeMake(dispatch.threadgroups, 1, 1)
          threadsPerThreadgroup:MTLSizeMake(dispatch.threads, 1, 1)];
}

void launch(const Dispatch& dispatch) {
  on_stream([&](at::mps::MPSStream* stream) { encode(stream, dispatch); });
}

// When the op hands on its result.
void finish() { simt::before_tensor_is_handed_on(); }

void run(const Dispatch& dispatch) {
  launch(dispatch);
  finish();
}

void check(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

bool is_filled(unsigned count, uint32_t value) {
  return std::all_of(buffer, buffer + count, [&](uint32_t word) { return word == value; });
}

const std::map<std::string, void (*)()> cases = {
    // Right.
    {"a launch runs when it is waited for",
     [] {
       launch({});
       check(is_filled(kWords, 0), "ran before anybody waited");
       check(holding, "lets go of what it works on");
       finish();
       check(is_filled(128, 1) && buffer[128] == 0, "did not run");
       check(!holding, "holds on to what it has worked on");
     }},
    {"launches run in their order",
     [] {
       for (uint32_t i = 0; i < kWords; ++i) buffer[i] = i;
       launch({.shader = "reverse", .threadgroups = 1, .memory_bytes = 256});
       launch({.threadgroups = 1});
       finish();
       for (uint32_t i = 0; i < 64; ++i) check(buffer[i] == 64 - i, "another order");
     }},
    {"a buffer is bound at an offset",
     [] {
       run({.offset = 512});
       check(is_filled(128, 0) && buffer[128] == 1 && buffer[255] == 1, "written elsewhere");
     }},
    {"fewer threadgroups take more turns",
     [] {
       metal_set_max_threadgroups(3);
       run({.shader = "take_turns", .threadgroups = kWords});
       check(is_filled(kWords, 1), "not all is done, or some twice");
     }},

    // Wrong, in the shader.
    {"a race", [] { run({.shader = "no_barrier", .threadgroups = 1, .memory_bytes = 256}); }},
    {"past the end", [] { run({.shader = "past_the_end"}); }},
    {"a lane misses the vote", [] { run({.shader = "a_lane_misses_the_vote"}); }},
    {"too little threadgroup memory",
     [] { run({.shader = "reverse", .threadgroups = 1, .memory_bytes = 128}); }},

    // Wrong, in the launch.
    {"a buffer is not bound", [] { run({.bound = nullptr}); }},
    {"what is bound is no buffer", [] { run({.bound = buffer + 1}); }},
    {"an offset past the buffer", [] { run({.offset = sizeof(buffer)}); }},
    {"bytes of another size", [] { run({.param_bytes = 16}); }},
    {"no threadgroup memory", [] { run({.shader = "reverse"}); }},
    {"odd threadgroup memory", [] { run({.shader = "reverse", .memory_bytes = 100}); }},
    {"too much threadgroup memory", [] { run({.shader = "reverse", .memory_bytes = 65536}); }},
    {"too large a threadgroup", [] { run({.threads = 1056}); }},
    {"too large a grid", [] { run({.threadgroups = NSUInteger{1} << 26}); }},
    {"a pipeline is made twice",
     [] {
       on_stream([](at::mps::MPSStream* stream) {
         make_pipeline(stream->device(), "add");
         make_pipeline(stream->device(), "add");
       });
     }},
    {"a pipeline after its last release",
     [] {
       on_stream([](at::mps::MPSStream* stream) {
         [pipeline(stream->device(), "add") release];
         encode(stream, {});
       });
     }},

    // Wrong, around it.
    {"outside of the queue", [] { encode(at::mps::getCurrentMPSStream(), {}); }},
    {"a second encoder",
     [] {
       on_stream(
           [](at::mps::MPSStream* stream) { [stream->commandBuffer() computeCommandEncoder]; });
     }},
    {"an encoder after its end",
     [] {
       on_stream([](at::mps::MPSStream* stream) {
         [stream->commandEncoder() endEncoding];
         encode(stream, {});
       });
     }},
    {"a commit while an encoder is open",
     [] { on_stream([](at::mps::MPSStream* stream) { [stream->commandBuffer() commit]; }); }},
    {"the queue waits for itself", [] { on_stream([](at::mps::MPSStream*) { launch({}); }); }},
    {"an exception leaves the queue",
     [] {
       at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
       dispatch_sync(stream->queue(), ^{
         // A block that takes no variable would be a global one, of a runtime that isn't here.
         if (stream != nullptr) throw std::runtime_error("thrown");
       });
     }},
    {"an object is autoreleased without a pool",
     [] { [NSString stringWithUTF8String:"nobody's"]; }},
};

}  // namespace

// Returns what is wrong, or "". Once in a process.
extern "C" __attribute__((visibility("default"))) const char* tiny_run(const char* name) {
  static std::string error;
  simt::add_memory(buffer, buffer, sizeof(buffer), true);
  at::mps::getCurrentMPSStream();
  try {
    cases.at(name)();
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

// A Mac with one GPU, as far as csrc/metal/ can tell: the parts of Foundation, Grand Central
// Dispatch, Metal and PyTorch's MPS stream that it calls. Shaders run on the engine, each when it
// is dispatched.
//
// What Metal or PyTorch would abort on, or leave undefined, ends the process with a message: a
// second encoder on a command buffer, an encoder used after its end, a commit while one is open;
// the stream, an encoder or a pipeline touched outside the stream's queue, an exception leaving
// that queue, waiting for it inside it; a buffer that is none, or that a shader takes and nobody
// bound, bytes of another size than the shader's type; a larger threadgroup or more threadgroup
// memory than there may be; an object autoreleased without a pool.

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <ATen/mps/MPSStream.h>
#include <objc/runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../tensors.h"
#include "metallib.h"
#include "shader.h"

namespace {

[[noreturn]] __attribute__((format(printf, 1, 2))) void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "metal emulator: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  abort();
}

std::atomic<int64_t> live_objects{0};
std::atomic<unsigned> max_threads{1024};

}  // namespace

// For the tests.
extern "C" {
__attribute__((visibility("default"))) int64_t metal_live_objects() { return live_objects; }
__attribute__((visibility("default"))) void metal_set_max_threads(unsigned threads) {
  max_threads = threads;
}
}

// ---------------------------------------------------------------------------------------------
// Foundation.

namespace {

thread_local std::vector<std::vector<NSObject*>> pools;

void autorelease_in_pool(NSObject* object) {
  if (pools.empty()) die("an object is autoreleased where there is no pool");
  pools.back().push_back(object);
}

}  // namespace

@implementation NSObject
+ (id)alloc {
  ++live_objects;
  NSObject* object = class_createInstance(self, 0);
  object->retain_count_ = 1;
  return object;
}
- (id)init {
  return self;
}
- (id)retain {
  ++retain_count_;
  return self;
}
- (void)release {
  if (retain_count_ == 0) die("an object is released too often");
  if (--retain_count_ == 0) [self dealloc];
}
- (id)autorelease {
  autorelease_in_pool(self);
  return self;
}
- (void)dealloc {
  --live_objects;
  object_dispose(self);
}
@end

@implementation NSAutoreleasePool
- (id)init {
  pools.emplace_back();
  return self;
}
- (void)drain {
  for (NSObject* object : pools.back()) [object release];
  pools.pop_back();
  [self release];
}
@end

@implementation NSString
+ (NSString*)stringWithUTF8String:(const char*)string {
  NSString* result = [NSString alloc];
  result->string_ = new std::string(string);
  return [result autorelease];
}
- (const char*)UTF8String {
  return static_cast<std::string*>(string_)->c_str();
}
- (void)dealloc {
  delete static_cast<std::string*>(string_);
  [super dealloc];
}
@end

@implementation NSError
- (NSString*)localizedDescription {
  return [NSString stringWithUTF8String:"the emulator was told to fail"];
}
@end

// ---------------------------------------------------------------------------------------------
// Grand Central Dispatch, and the runtime of the blocks that it takes.

extern "C" {
__attribute__((visibility("hidden"))) void* _NSConcreteStackBlock[32];
}

struct dispatch_queue_s {
  std::mutex mutex;
  std::atomic<std::thread::id> runner;
};

namespace {

dispatch_queue_s stream_queue;

void check_in_queue(const char* what) {
  if (stream_queue.runner == std::this_thread::get_id()) return;
  die("%s outside of the stream's queue", what);
}

}  // namespace

void dispatch_sync(dispatch_queue_t queue, void (^block)()) {
  if (queue->runner == std::this_thread::get_id()) die("a queue waits for itself");
  const std::lock_guard<std::mutex> lock(queue->mutex);
  queue->runner = std::this_thread::get_id();
  try {
    block();
  } catch (...) {
    die("an exception leaves the queue");
  }
  queue->runner = std::thread::id();
}

// ---------------------------------------------------------------------------------------------
// What clang's code for __bf16 calls, and older runtimes of GCC lack.

extern "C" __bf16 __truncsfbf2(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) {
    bits |= 0x400000;  // a NaN that stays one
  } else {
    bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
  }
  const auto upper = static_cast<uint16_t>(bits >> 16);
  __bf16 result;
  std::memcpy(&result, &upper, sizeof(result));
  return result;
}

// ---------------------------------------------------------------------------------------------
// Metal.

@interface EmulatedFunction : NSObject <MTLFunction> {
 @public
  const simt_metal::Shader* shader_;
}
@end
@implementation EmulatedFunction
@end

@interface EmulatedPipeline : NSObject <MTLComputePipelineState> {
 @public
  const simt_metal::Shader* shader_;
}
@end
@implementation EmulatedPipeline
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return max_threads;
}
@end

@interface EmulatedLibrary : NSObject <MTLLibrary>
@end
@implementation EmulatedLibrary
- (id<MTLFunction>)newFunctionWithName:(NSString*)name {
  for (size_t i = 0; i < simt_metal::num_shaders; ++i) {
    if (strcmp(simt_metal::shaders[i].name, [name UTF8String]) != 0) continue;
    EmulatedFunction* function = [[EmulatedFunction alloc] init];
    function->shader_ = &simt_metal::shaders[i];
    return function;
  }
  return nil;
}
@end

id<MTLLibrary> simt_metal::createLibrary(id<MTLDevice>, NSError**) {
  return [[EmulatedLibrary alloc] init];
}

@interface EmulatedDevice : NSObject <MTLDevice>
@end
@implementation EmulatedDevice
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                                             error:(NSError**)error {
  check_in_queue("a pipeline is made");
  if (getenv("METAL_EMULATOR_NO_PIPELINES") != nullptr) {
    *error = [[[NSError alloc] init] autorelease];
    return nil;
  }
  EmulatedPipeline* pipeline = [[EmulatedPipeline alloc] init];
  pipeline->shader_ = static_cast<EmulatedFunction*>(function)->shader_;
  return pipeline;
}
@end

namespace {

constexpr size_t kMaxThreadgroupBytes = 32 << 10;
constexpr unsigned kMaxBindings = 31;

struct Binding {
  const void* address = nullptr;
  std::vector<char> bytes;  // of setBytes
};

// Of the shader that is being dispatched.
Binding bindings[kMaxBindings];
size_t threadgroup_bytes = 0;
alignas(16) char threadgroup_memory[kMaxThreadgroupBytes];
const simt_metal::Shader* dispatched = nullptr;

}  // namespace

namespace simt_metal {

const void* bound_buffer(uint32_t index, size_t size) {
  const Binding& binding = bindings[index];
  if (binding.bytes.empty() || size == 0) return binding.address;
  if (binding.bytes.size() != size) {
    die("%s takes %zu bytes as buffer %u, %zu are bound", dispatched->name, size, index,
        binding.bytes.size());
  }
  return binding.bytes.data();
}

void* bound_threadgroup_memory(uint32_t) { return threadgroup_memory; }

}  // namespace simt_metal

@interface EmulatedComputeEncoder : NSObject <MTLComputeCommandEncoder> {
 @public
  bool ended_;
  EmulatedPipeline* pipeline_;
}
@end
@implementation EmulatedComputeEncoder
- (void)check:(const char*)what {
  check_in_queue(what);
  if (ended_) die("%s on an encoder that has ended", what);
}
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  [self check:"a pipeline is set"];
  pipeline_ = static_cast<EmulatedPipeline*>(state);
}
- (Binding*)bindingAt:(NSUInteger)index {
  if (index >= kMaxBindings) die("there is no buffer index %lu", index);
  bindings[index] = {};
  return &bindings[index];
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  [self check:"a buffer is bound"];
  const void* address = reinterpret_cast<const void*>(buffer);
  const size_t bytes = simt::storage_bytes(address);
  if (bytes == 0) die("what is bound as buffer %lu is no buffer", index);
  if (offset >= bytes) die("buffer %lu of %zu bytes is bound at %lu", index, bytes, offset);
  [self bindingAt:index]->address = static_cast<const char*>(address) + offset;
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  [self check:"bytes are bound"];
  if (length > 4096) die("%lu bytes are bound, 4096 may be", length);
  Binding* binding = [self bindingAt:index];
  binding->bytes.assign(static_cast<const char*>(bytes), static_cast<const char*>(bytes) + length);
  binding->address = binding->bytes.data();
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  [self check:"threadgroup memory is set"];
  if (index != 0) die("the emulator has threadgroup memory 0 only");
  if (length % 16 != 0) die("%lu bytes of threadgroup memory are no multiple of 16", length);
  if (length > kMaxThreadgroupBytes) {
    die("%lu bytes of threadgroup memory, %zu may be", length, kMaxThreadgroupBytes);
  }
  threadgroup_bytes = length;
}
- (void)dispatchThreadgroups:(MTLSize)threadgroups threadsPerThreadgroup:(MTLSize)threads {
  [self check:"a shader is dispatched"];
  if (pipeline_ == nil) die("a dispatch without a pipeline");
  dispatched = pipeline_->shader_;
  if (threadgroups.height * threadgroups.depth * threads.height * threads.depth != 1) {
    die("the emulator has one dimension only");
  }
  if (threads.width > max_threads) {
    die("%s is dispatched with %lu threads a threadgroup, %u may be", dispatched->name,
        threads.width, max_threads.load());
  }
  for (unsigned i = 0; i < kMaxBindings; ++i) {
    if ((dispatched->buffers >> i & 1) == 0) continue;
    if (bindings[i].address == nullptr) die("%s is missing buffer %u", dispatched->name, i);
  }
  if (dispatched->takes_threadgroup_memory && threadgroup_bytes == 0) {
    die("%s is missing threadgroup memory", dispatched->name);
  }
  for (Binding& binding : bindings) {
    if (!binding.bytes.empty()) {
      simt::add_memory(&binding, binding.bytes.data(), binding.bytes.size(), false);
    }
  }
  auto clear = [&] {
    for (Binding& binding : bindings) {
      simt::drop_memory(&binding);
      binding = {};
    }
    threadgroup_bytes = 0;
  };
  try {
    simt::launch(static_cast<unsigned>(threadgroups.width), static_cast<unsigned>(threads.width),
                 threadgroup_memory, threadgroup_bytes, dispatched->run, nullptr);
  } catch (...) {
    clear();
    throw;
  }
  clear();
}
- (void)endEncoding {
  [self check:"an encoder is ended"];
  ended_ = true;
}
@end

namespace {
bool has_open_encoder(id encoder) {
  return encoder != nil && !static_cast<EmulatedComputeEncoder*>(encoder)->ended_;
}
}  // namespace

@implementation MPSCommandBuffer
- (id<MTLComputeCommandEncoder>)computeCommandEncoder {
  check_in_queue("an encoder is made");
  if (has_open_encoder(encoder_)) {
    die("a command encoder is already encoding to this command buffer");
  }
  encoder_ = [[EmulatedComputeEncoder alloc] init];
  return encoder_;
}
- (void)commit {
  if (has_open_encoder(encoder_)) die("a commit while an encoder is open");
}
@end

// ---------------------------------------------------------------------------------------------
// PyTorch, whose last kernel has left its encoder open.

namespace at::mps {

MPSStream::MPSStream(Stream stream) : _stream(stream) {
  _serialQueue = &stream_queue;
  _commandBuffer = [[MPSCommandBuffer alloc] init];
  dispatch_sync(_serialQueue, ^{
    commandEncoder();
  });
}
MPSStream::~MPSStream() = default;

MTLDevice_t MPSStream::device() const {
  static EmulatedDevice* device = [[EmulatedDevice alloc] init];
  return device;
}

MPSCommandBuffer* MPSStream::commandBuffer() { return _commandBuffer; }

MTLComputeCommandEncoder_t MPSStream::commandEncoder() {
  check_in_queue("the stream's encoder is taken");
  if (_commandEncoder == nil) _commandEncoder = [_commandBuffer computeCommandEncoder];
  return _commandEncoder;
}

MPSStream* getCurrentMPSStream() {
  static MPSStream stream(Stream(Stream::UNSAFE, c10::Device(c10::DeviceType::MPS, 0), /*id=*/0));
  return &stream;
}

}  // namespace at::mps

// A Mac with one GPU, as far as csrc/metal/ can tell: the parts of Foundation, Grand Central
// Dispatch, Metal and PyTorch's MPS streams that it calls. Shaders run on the engine, later than
// they are dispatched: when the op hands on its result, or a tensor that PyTorch is to work on,
// after the host's part has let go of what it made.
//
// What Metal or PyTorch would abort on, or leave undefined, ends the process with a message: a
// second encoder on a command buffer, an encoder used after its end, a commit while one is open; a
// stream or an encoder touched outside the stream's queue, an exception leaving that queue, waiting
// for it inside it; a pipeline made twice, which is what comes of making them without a lock; an
// object used after its last release; a buffer that is none, or none any more when a shader is
// dispatched, or that a shader takes and nobody bound, bytes of another size than the shader's
// type; a larger threadgroup, more threadgroup memory or more threads than there may be; an object
// autoreleased without a pool.

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <ATen/mps/MPSStream.h>
#include <c10/metal/error.h>
#include <link.h>
#include <objc/runtime.h>
#include <unwind.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
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
std::atomic<unsigned> max_threadgroups{0};
std::atomic<bool> runs_shaders{true};
thread_local unsigned current_stream = 0;

}  // namespace

// For the tests.
extern "C" {
__attribute__((visibility("default"))) int64_t metal_live_objects() { return live_objects; }
__attribute__((visibility("default"))) void metal_set_max_threads(unsigned threads) {
  max_threads = threads;
}
// Whether dispatched shaders run, or are only checked.
__attribute__((visibility("default"))) void metal_run_shaders(bool run) { runs_shaders = run; }
// The most threadgroups that are made of a larger grid, as if 32 bits could number no more; or 0.
__attribute__((visibility("default"))) void metal_set_max_threadgroups(unsigned threadgroups) {
  max_threadgroups = threadgroups;
}
// The stream of the calling thread: 0 is the default one, 1 to 32 are the pool's.
__attribute__((visibility("default"))) void metal_set_stream(unsigned stream) {
  current_stream = stream;
}
}

// Out of line: the shaders' flags have divisions that aren't rounded correctly.
namespace metal::precise {
float divide(float a, float b) { return a / b; }
}  // namespace metal::precise

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
  [self checkAlive];
  ++retain_count_;
  return self;
}
- (void)checkAlive {
  if (retain_count_ == 0) die("an object is used after its last release");
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
  --live_objects;  // and stays, to be recognised if it is used
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

void check_in_queue(dispatch_queue_t queue, const char* what) {
  if (queue->runner == std::this_thread::get_id()) return;
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

// In place of the Objective-C runtime's, which catches nothing that C++ throws: not above, and not
// in the op's launcher. Nobody here throws anything else.
extern "C" {
_Unwind_Reason_Code __gxx_personality_v0(int, _Unwind_Action, uint64_t, _Unwind_Exception*,
                                         _Unwind_Context*);
_Unwind_Reason_Code __gnu_objc_personality_v0(int version, _Unwind_Action actions, uint64_t kind,
                                              _Unwind_Exception* exception,
                                              _Unwind_Context* context) {
  return __gxx_personality_v0(version, actions, kind, exception, context);
}
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

namespace {

// The functions of all sources, by name.
std::map<std::string, simt_metal::Shader>& library() {
  static std::map<std::string, simt_metal::Shader> shaders;
  return shaders;
}

}  // namespace

int simt_metal::add_shaders(const Shader* shaders, size_t num_shaders) {
  for (size_t i = 0; i < num_shaders; ++i) {
    if (!library().emplace(shaders[i].name, shaders[i]).second) {
      die("there are two functions called %s", shaders[i].name);
    }
  }
  return 0;
}

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
- (NSUInteger)threadExecutionWidth {
  const char* width = getenv("METAL_EMULATOR_SIMD_WIDTH");
  return width == nullptr ? simt::kWarpSize : static_cast<NSUInteger>(atoi(width));
}
@end

@interface EmulatedLibrary : NSObject <MTLLibrary>
@end
@implementation EmulatedLibrary
- (id<MTLFunction>)newFunctionWithName:(NSString*)name {
  const auto shader = library().find([name UTF8String]);
  if (shader == library().end()) return nil;
  EmulatedFunction* function = [[EmulatedFunction alloc] init];
  function->shader_ = &shader->second;
  return function;
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
  if (getenv("METAL_EMULATOR_NO_PIPELINES") != nullptr) {
    *error = [[[NSError alloc] init] autorelease];
    return nil;
  }
  EmulatedPipeline* pipeline = [[EmulatedPipeline alloc] init];
  pipeline->shader_ = static_cast<EmulatedFunction*>(function)->shader_;
  // Long enough for another thread to come by.
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  static std::mutex mutex;
  static std::set<std::string> made;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!made.insert(pipeline->shader_->name).second) {
    die("the pipeline of %s is made twice", pipeline->shader_->name);
  }
  return pipeline;
}
@end

namespace {

constexpr size_t kMaxThreadgroupBytes = 32 << 10;
constexpr unsigned kMaxBindings = 31;

struct Binding {
  const void* buffer = nullptr;
  const void* address = nullptr;
  std::vector<char> bytes;  // of setBytes
};

// A dispatch, with what was bound. What it refers to stays until it has run, as a command buffer
// sees to.
struct Command {
  EmulatedPipeline* pipeline;
  std::array<Binding, kMaxBindings> bindings;
  size_t threadgroup_bytes;
  unsigned threadgroups, threads;
};

// The one that is running: the engine runs one at a time.
std::mutex running_mutex;
const Command* running = nullptr;
alignas(16) char threadgroup_memory[kMaxThreadgroupBytes];

// Shaders may read what is in the constant address space outside of functions: this library's
// segments that can be neither written nor executed.
int add_constants(dl_phdr_info* library, size_t, void*) {
  const auto own = reinterpret_cast<ElfW(Addr)>(&add_constants);
  const auto has_own = [&](const ElfW(Phdr) & segment) {
    return segment.p_type == PT_LOAD &&
           own - (library->dlpi_addr + segment.p_vaddr) < segment.p_memsz;
  };
  const auto* begin = library->dlpi_phdr;
  const auto* end = begin + library->dlpi_phnum;
  if (std::none_of(begin, end, has_own)) return 0;
  for (const auto* segment = begin; segment != end; ++segment) {
    if (segment->p_type != PT_LOAD || segment->p_flags != PF_R) continue;
    const auto* address = reinterpret_cast<const void*>(library->dlpi_addr + segment->p_vaddr);
    simt::add_memory(segment, address, segment->p_memsz, false);
  }
  return 1;
}

// Throws what the engine throws.
void run(Command& command) {
  const std::lock_guard<std::mutex> lock(running_mutex);
  static const int added = dl_iterate_phdr(add_constants, nullptr);
  if (added != 1) die("the library's constants are not found");
  running = &command;
  for (Binding& binding : command.bindings) {
    if (binding.bytes.empty()) continue;
    simt::add_memory(&binding, binding.bytes.data(), binding.bytes.size(), false);
  }
  std::exception_ptr failure;
  try {
    simt::launch(command.threadgroups, command.threads, threadgroup_memory,
                 command.threadgroup_bytes, command.pipeline->shader_->run, nullptr);
  } catch (...) {
    failure = std::current_exception();
  }
  for (Binding& binding : command.bindings) simt::drop_memory(&binding);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

namespace simt_metal {

const void* bound_buffer(uint32_t index, size_t size) {
  const Binding& binding = running->bindings[index];
  if (binding.bytes.empty()) return binding.address;
  if (binding.bytes.size() != size && size != 0) {
    die("%s takes %zu bytes as buffer %u, %zu are bound", running->pipeline->shader_->name, size,
        index, binding.bytes.size());
  }
  return binding.bytes.data();
}

void* bound_threadgroup_memory(uint32_t) { return threadgroup_memory; }

}  // namespace simt_metal

namespace {
size_t buffer_bytes(const void* address);
}

@interface EmulatedComputeEncoder : NSObject <MTLComputeCommandEncoder> {
 @public
  dispatch_queue_t queue_;
  bool ended_;
  Command* next_;
  std::vector<Command>* commands_;  // dispatched, and not yet run
}
@end
@implementation EmulatedComputeEncoder
- (void)check:(const char*)what {
  check_in_queue(queue_, what);
  if (ended_) die("%s on an encoder that has ended", what);
}
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  [self check:"a pipeline is set"];
  next_->pipeline = static_cast<EmulatedPipeline*>(state);
  [next_->pipeline checkAlive];
}
- (Binding*)bindingAt:(NSUInteger)index {
  if (index >= kMaxBindings) die("there is no buffer index %lu", index);
  next_->bindings[index] = {};
  return &next_->bindings[index];
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  [self check:"a buffer is bound"];
  const void* address = reinterpret_cast<const void*>(buffer);
  const size_t bytes = buffer_bytes(address);
  if (bytes == 0) die("what is bound as buffer %lu is no buffer", index);
  if (offset >= bytes) die("buffer %lu of %zu bytes is bound at %lu", index, bytes, offset);
  Binding* binding = [self bindingAt:index];
  binding->buffer = address;
  binding->address = static_cast<const char*>(address) + offset;
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  [self check:"bytes are bound"];
  if (length > 4096) die("%lu bytes are bound, 4096 may be", length);
  const char* begin = static_cast<const char*>(bytes);
  [self bindingAt:index]->bytes.assign(begin, begin + length);
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  [self check:"threadgroup memory is set"];
  if (index != 0) die("the emulator has threadgroup memory 0 only");
  if (length % 16 != 0) die("%lu bytes of threadgroup memory are no multiple of 16", length);
  if (length > kMaxThreadgroupBytes) {
    die("%lu bytes of threadgroup memory, %zu may be", length, kMaxThreadgroupBytes);
  }
  next_->threadgroup_bytes = length;
}
- (void)dispatchThreadgroups:(MTLSize)threadgroups threadsPerThreadgroup:(MTLSize)threads {
  [self check:"a shader is dispatched"];
  if (next_->pipeline == nil) die("a dispatch without a pipeline");
  const simt_metal::Shader* shader = next_->pipeline->shader_;
  if (threadgroups.height * threadgroups.depth * threads.height * threads.depth != 1) {
    die("the emulator has one dimension only");
  }
  if (threads.width > max_threads) {
    die("%s is dispatched with %lu threads a threadgroup, %u may be", shader->name, threads.width,
        max_threads.load());
  }
  if (threadgroups.width * threads.width > UINT32_MAX) {
    die("%s is dispatched with %lu threads, which 32 bits can't number", shader->name,
        threadgroups.width * threads.width);
  }
  for (unsigned i = 0; i < kMaxBindings; ++i) {
    if ((shader->buffers >> i & 1) == 0) continue;
    if (next_->bindings[i].address == nullptr && next_->bindings[i].bytes.empty()) {
      die("%s is missing buffer %u", shader->name, i);
    }
    // It may have been let go since it was bound.
    const void* buffer = next_->bindings[i].buffer;
    if (buffer != nullptr && buffer_bytes(buffer) == 0) {
      die("what %s has as buffer %u is no buffer any more", shader->name, i);
    }
  }
  if (shader->takes_threadgroup_memory && next_->threadgroup_bytes == 0) {
    die("%s is missing threadgroup memory", shader->name);
  }
  next_->threadgroups = static_cast<unsigned>(threadgroups.width);
  if (max_threadgroups != 0 && shader->takes_turns) {
    next_->threadgroups = std::min<unsigned>(next_->threadgroups, max_threadgroups);
  }
  next_->threads = static_cast<unsigned>(threads.width);
  if (runs_shaders) {
    [next_->pipeline retain];
    commands_->push_back(*next_);
    simt::hold_tensors();
  }
  *next_ = {};  // a shader of ours leaves nothing to the next
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
  check_in_queue(queue_, "an encoder is made");
  if (has_open_encoder(encoder_)) {
    die("a command encoder is already encoding to this command buffer");
  }
  EmulatedComputeEncoder* encoder = [[EmulatedComputeEncoder alloc] init];
  encoder->queue_ = queue_;
  encoder->next_ = new Command{};
  encoder->commands_ = new std::vector<Command>;
  encoder_ = encoder;
  return encoder;
}
- (void)commit {
  if (has_open_encoder(encoder_)) die("a commit while an encoder is open");
}
@end

// ---------------------------------------------------------------------------------------------
// PyTorch, whose last kernel on each stream has left its encoder open.

namespace {

constexpr unsigned kNumStreams = 33;  // the default one and the pool's

// What PyTorch keeps of a stream beside its MPSStream.
struct StreamState {
  dispatch_queue_s queue;
  c10::metal::ErrorMessages errors{};
  MPSCommandBuffer* command_buffer;
  std::unique_ptr<at::mps::MPSStream> stream;
} streams[kNumStreams];

size_t buffer_bytes(const void* address) {
  for (const StreamState& state : streams) {
    if (address == &state.errors) return sizeof(state.errors);
  }
  return simt::storage_bytes(address);
}

StreamState& state_of(const at::mps::MPSStream& stream) { return streams[stream.unwrap().id()]; }

// Runs what has been dispatched on the calling thread's stream, and lets go of what that held.
void finish() {
  StreamState& state = state_of(*at::mps::getCurrentMPSStream());
  std::exception_ptr failure;
  {
    const std::lock_guard<std::mutex> lock(state.queue.mutex);
    auto* encoder = static_cast<EmulatedComputeEncoder*>(state.command_buffer->encoder_);
    for (Command& command : *encoder->commands_) {
      try {
        if (!failure) run(command);
      } catch (...) {
        failure = std::current_exception();
      }
      [command.pipeline release];
    }
    encoder->commands_->clear();
  }
  simt::release_tensors();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

// What PyTorch raises when it next synchronises with the calling thread's stream, or null.
extern "C" __attribute__((visibility("default"))) const char* metal_synchronize() {
  StreamState& state = state_of(*at::mps::getCurrentMPSStream());
  static thread_local std::string message;
  if (state.errors.count == 0) return nullptr;
  message = state.errors.msg[0].message;
  state.errors = {};
  return message.c_str();
}

namespace at::mps {

MPSStream::MPSStream(Stream stream) : _stream(stream) {
  StreamState& state = state_of(*this);
  simt::before_tensor_is_handed_on = finish;
  simt::add_memory(this, &state.errors, sizeof(state.errors), true);
  _serialQueue = &state.queue;
  _commandBuffer = state.command_buffer = [[MPSCommandBuffer alloc] init];
  _commandBuffer->queue_ = _serialQueue;
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
  check_in_queue(_serialQueue, "the stream's encoder is taken");
  if (_commandEncoder == nil) _commandEncoder = [_commandBuffer computeCommandEncoder];
  return _commandEncoder;
}

MTLBuffer_t MPSStream::getErrorBuffer() { return (id<MTLBuffer>)&state_of(*this).errors; }

MPSStream* getCurrentMPSStream() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<MPSStream>& stream = streams[current_stream].stream;
  if (stream == nullptr) {
    const c10::Device device(c10::DeviceType::MPS, 0);
    stream = std::make_unique<MPSStream>(Stream(Stream::UNSAFE, device, current_stream));
  }
  return stream.get();
}

}  // namespace at::mps

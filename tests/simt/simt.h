// A machine that runs GPU kernels on the CPU, one instruction stream per thread, strictly. The
// words are CUDA's; cuda/ and metal/ are its faces.
//
// A grid's blocks run one after the other, a block's threads as fibers of one OS thread, each until
// it waits for others. Which block and which thread comes next is shuffled by a seed, so that what
// depends on it shows as a result that changes. The device code is compiled with -fsanitize=thread
// and linked with this engine in place of that sanitizer's runtime: every load and store calls in
// here, from unmodified sources. A launch fails, with a message, on
//
//   - an access outside the op's tensors, the block's shared memory and the thread's own stack, a
//     write to a tensor that was taken as const, an access not aligned to its size;
//   - a race: two threads, at least one writing, not both atomically, with no barrier between them
//     (of the block, or of the warp within one; a vote, a match or a shuffle is none), or in two
//     blocks of one launch;
//   - a barrier or a warp operation that some threads never reach, lanes that disagree on the mask,
//     a lane that is not in its own mask, a shuffle from a lane that isn't;
//   - more shared memory than was asked for, a device-side assertion.
//
// Shared memory is filled with 0xff (NaN, -1) before each block.
//
// On request it counts what each launch reads and writes of each tensor, see Traffic.
//
// Not modelled: time, caches and occupancy; weak memory (a store is seen at once); atomics other
// than whole ones; streams (a launch is over when it returns), several devices; a warp's lanes in
// lockstep, on which correct code doesn't rely; registers (a local that is read before it is
// written is not noticed). Arithmetic is the host's: IEEE, as the GPU's additions and conversions
// are.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

// Calls thread(argument) for each thread of each block. Throws std::runtime_error if one fails. If
// the launch may overlap with the one before it, each thread must call wait_for_previous_launch,
// and until then leave alone what the launches before it have touched, back to the last that could
// not overlap: what they wrote, and, to write, what they read.
void launch(unsigned blocks, unsigned threads, void* shared, size_t shared_bytes,
            void (*thread)(const void*), const void* argument, bool overlaps = false);
void wait_for_previous_launch();

// What the running thread is, and what it does together with others.
unsigned thread_index();
unsigned num_threads();
unsigned block_index();
unsigned num_blocks();
void sync_block();
void sync_warp();  // the one warp operation that orders memory
uint64_t shuffle(uint32_t mask, uint64_t value, unsigned source);
uint32_t ballot(uint32_t mask, bool predicate);
uint32_t match(uint32_t mask, uint64_t value);  // the lanes that brought the same value
// Stores change(old value) and returns the old one.
uint32_t atomic(uint32_t* address, const std::function<uint32_t(uint32_t)>& change);
// Of a vector, whose access the compiler may have split into smaller ones.
void check_aligned(const void* address, size_t bytes);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool in_kernel();

// What one launch read [0] and wrote [1] of one tensor. A fill is a launch of its own.
struct Traffic {
  uint64_t launch;            // number, from 0
  uint64_t begin;             // the tensor's address, or 0 for the blocks' shared memory
  uint64_t bytes[2];          // that threads asked for, all together
  uint64_t sectors[2];        // of 32 bytes, each counted once a launch: what memory must move
  uint64_t block_sectors[2];  // each counted once a block: what caches that blocks share must move
};
constexpr size_t kSectorBytes = 32;
void count_fill(const void* address, size_t bytes);

// The memory that kernels may touch, from now until `owner` is dropped.
void add_memory(const void* owner, const void* begin, size_t bytes, bool writable);
void drop_memory(const void* owner);

}  // namespace simt

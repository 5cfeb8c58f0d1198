// See simt.h.

#include "simt.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kGranule = 2;  // bytes that share a shadow, the size of the smallest element

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  char* stack = nullptr;
  bool created = false;  // else its context is to be made
  jmp_buf context;
  State state;
  bool waited;  // for the previous launch
};

struct Warp {
  uint32_t mask, arrived;
  uint64_t arriving[kWarpSize], arrived_values[kWarpSize];
  uint32_t epoch;  // barriers so far
};

// Who touched a granule. `run` numbers blocks across all launches.
constexpr uint16_t kSeveral = 0xffff;
constexpr uint16_t kSeveralOfWarp = 0x8000;  // | the warp
struct Access {
  uint32_t run = 0;
  uint32_t block_epoch = 0, warp_epoch = 0;
  uint16_t thread = 0;
  bool atomic = false;
};
struct Shadow {
  Access write, read;
};

struct Memory {
  const void* owner;
  uintptr_t begin, end;
  bool writable;
  Shadow* shadow;  // one per granule; zero pages until touched
  mutable Traffic traffic;
  // Of each sector, the `run` that touched it last: read, written. Made when it is first counted.
  mutable std::vector<uint32_t> sector_runs[2];
};

Shadow* new_shadow(size_t bytes) {
  void* memory = mmap(nullptr, (bytes / kGranule + 2) * sizeof(Shadow), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for shadows");
  return static_cast<Shadow*>(memory);
}
void delete_shadow(const Memory& memory) {
  if (memory.shadow == nullptr) return;
  munmap(memory.shadow, ((memory.end - memory.begin) / kGranule + 2) * sizeof(Shadow));
}

std::mutex launch_mutex, memory_mutex;
std::vector<Memory> memories;
bool counting = false;
uint64_t num_launches;  // counted ones
std::vector<Traffic> traffic_log;
std::minstd_rand generator;

Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kWarpSize];
Memory shared;
void (*body)(const void*);
const void* body_argument;
unsigned block, blocks, threads;
uint32_t run, first_run_of_launch, block_epoch;
uint32_t first_run_of_chain;  // of the last launch that didn't overlap, and of those that did since
unsigned at_block_barrier;
bool overlaps;
std::string error;

jmp_buf scheduler;
thread_local Fiber* current = nullptr;  // null outside of kernels

unsigned current_index() { return static_cast<unsigned>(current - fibers); }
Warp& current_warp() { return warps[current_index() / kWarpSize]; }

void yield() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

// A fiber lives on after its thread is done, for the next block's.
void fiber_main() {
  for (;;) {
    body(body_argument);
    if (overlaps && !current->waited) fail("a thread ends without waiting for the previous launch");
    current->state = State::kDone;
    yield();
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.created) _longjmp(fiber.context, 1);
    if (fiber.stack == nullptr) {
      fiber.stack = static_cast<char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
    fiber.created = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack;
    start.uc_stack.ss_size = kStackBytes;
    start.uc_link = nullptr;
    makecontext(&start, fiber_main, 0);
    setcontext(&start);
  }
  current = nullptr;
}

void run_block(std::vector<unsigned>& order) {
  std::memset(reinterpret_cast<void*>(shared.begin), 0xff, shared.end - shared.begin);
  for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  for (unsigned i = 0; i < threads; ++i) fibers[i].waited = false;
  for (Warp& warp : warps) warp.arrived = warp.epoch = 0;
  block_epoch = at_block_barrier = 0;
  ++run;
  for (bool progress = true; progress;) {
    progress = false;
    std::shuffle(order.begin(), order.end(), generator);
    for (unsigned i : order) {
      if (fibers[i].state != State::kReady) continue;
      progress = true;
      resume(fibers[i]);
      if (!error.empty()) return;
    }
  }
  unsigned waiting = 0;
  for (unsigned i = 0; i < threads; ++i) waiting += fibers[i].state == State::kAtWarpBarrier;
  if (waiting + at_block_barrier > 0) {
    error = "block " + std::to_string(block) + " is stuck: of " + std::to_string(threads) +
            " threads, " + std::to_string(at_block_barrier) + " wait at a block's barrier and " +
            std::to_string(waiting) + " at a warp's for others that never come";
  }
}

// ---------------------------------------------------------------------------------------------
// Accesses.

unsigned warp_of(const Access& access) {
  return (access.thread & kSeveralOfWarp) != 0 ? access.thread & ~kSeveralOfWarp
                                               : access.thread / kWarpSize;
}

bool is_ordered(const Access& access, const Memory& memory) {
  if (access.run < first_run_of_launch || access.run == 0) return true;  // an earlier launch's
  if (access.run != run) return &memory == &shared;                      // which is the block's own
  if (access.block_epoch != block_epoch) return true;
  if (access.thread == kSeveral) return false;
  if (access.thread == current_index()) return true;
  return warp_of(access) == current_index() / kWarpSize &&
         access.warp_epoch != current_warp().epoch;
}

std::string describe(const Memory& memory) {
  if (&memory == &shared) return "shared memory";
  return "a tensor of " + std::to_string(memory.end - memory.begin) + " bytes";
}

void record(const Memory& memory, size_t granule, bool write, bool atomic) {
  Shadow& shadow = memory.shadow[granule];
  auto check = [&](const Access& other, const char* what) {
    if (is_ordered(other, memory) || (atomic && other.atomic)) return;
    const std::string thread = (other.thread & kSeveralOfWarp) != 0
                                   ? "several threads"
                                   : "thread " + std::to_string(other.thread);
    fail(
        "a race: thread %u of block %u %s byte %zu of %s, which %s of %s block %s, and no barrier "
        "is between",
        current_index(), block, write ? "writes" : "reads", granule * kGranule,
        describe(memory).c_str(), thread.c_str(), other.run == run ? "the same" : "another", what);
  };
  check(shadow.write, "wrote");
  if (write) check(shadow.read, "read");
  auto may_still_run = [](const Access& other) {
    return other.run >= first_run_of_chain && other.run < first_run_of_launch;
  };
  if (!current->waited && (may_still_run(shadow.write) || (write && may_still_run(shadow.read)))) {
    fail("thread %u of block %u %s byte %zu of %s before it has waited for the previous launch",
         current_index(), block, write ? "writes" : "reads", granule * kGranule,
         describe(memory).c_str());
  }
  Access access{run, block_epoch, current_warp().epoch, static_cast<uint16_t>(current_index()),
                atomic};
  if (write) {
    shadow.write = access;
  } else {
    if (!is_ordered(shadow.read, memory)) {
      const unsigned warp = current_index() / kWarpSize;
      const bool same_warp =
          shadow.read.run == run && shadow.read.thread != kSeveral && warp_of(shadow.read) == warp;
      access.thread = same_warp ? static_cast<uint16_t>(kSeveralOfWarp | warp) : kSeveral;
    }
    shadow.read = access;
  }
}

// Adds one access to the memory's traffic.
void count(const Memory& memory, uintptr_t address, size_t bytes, bool write) {
  Traffic& traffic = memory.traffic;
  traffic.bytes[write] += bytes;
  std::vector<uint32_t>& runs = memory.sector_runs[write];
  if (runs.empty()) runs.resize(memory.end / kSectorBytes - memory.begin / kSectorBytes + 1);
  const uintptr_t first_sector = memory.begin / kSectorBytes;
  for (uintptr_t sector = address / kSectorBytes; sector <= (address + bytes - 1) / kSectorBytes;
       ++sector) {
    uint32_t& last = runs[sector - first_sector];
    traffic.sectors[write] += last < first_run_of_launch;
    traffic.block_sectors[write] += last != run;
    last = run;
  }
}

// Moves what a launch has counted to the log.
void log_traffic(const Memory& memory) {
  Traffic& traffic = memory.traffic;
  if (traffic.bytes[0] + traffic.bytes[1] == 0) return;
  traffic.launch = num_launches;
  traffic.begin = &memory == &shared ? 0 : memory.begin;
  traffic_log.push_back(traffic);
  traffic = {};
}

void on_access(const void* pointer, size_t bytes, bool write, bool atomic = false) {
  if (current == nullptr) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto stack = reinterpret_cast<uintptr_t>(current->stack);
  if (address >= stack && address + bytes <= stack + kStackBytes) return;
  check_aligned(pointer, bytes);
  const Memory* found = nullptr;
  auto contains = [&](const Memory& memory) {
    return address >= memory.begin && address + bytes <= memory.end && (memory.writable || !write);
  };
  if (contains(shared)) {
    found = &shared;
  } else {
    for (const Memory& memory : memories) {
      if (contains(memory) && (found == nullptr || memory.writable)) found = &memory;
    }
  }
  if (found == nullptr) {
    fail("thread %u of block %u %s %zu bytes at %p, outside of %s memory", current_index(), block,
         write ? "writes" : "reads", bytes, pointer, write ? "writable" : "its");
  }
  if (counting) count(*found, address, bytes, write);
  if (!found->writable) return;  // what nobody writes can't race
  const size_t first = (address - found->begin) / kGranule;
  const size_t last = (address + bytes - 1 - found->begin) / kGranule;
  for (size_t i = first; i <= last; ++i) record(*found, i, write, atomic);
}

// One round of a warp operation: returns what each lane brought. Memory is ordered by a barrier.
const uint64_t* exchange(uint32_t mask, uint64_t value, bool is_barrier = false) {
  Warp& warp = current_warp();
  const uint32_t lane = uint32_t{1} << current_index() % kWarpSize;
  if ((mask & lane) == 0) fail("thread %u is not in its own mask %08x", current_index(), mask);
  if (warp.arrived == 0) warp.mask = mask;
  if (warp.mask != mask) {
    fail("thread %u comes with the mask %08x, its warp with %08x", current_index(), mask,
         warp.mask);
  }
  warp.arrived |= lane;
  warp.arriving[current_index() % kWarpSize] = value;
  if (warp.arrived == mask) {
    std::copy_n(warp.arriving, kWarpSize, warp.arrived_values);
    warp.arrived = 0;
    if (is_barrier) ++warp.epoch;
    Fiber* first = fibers + current_index() / kWarpSize * kWarpSize;
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (mask >> i & 1) first[i].state = State::kReady;
    }
  } else {
    current->state = State::kAtWarpBarrier;
    yield();
  }
  return warp.arrived_values;  // stays until every lane has come to the next round
}

}  // namespace

void launch(unsigned num_blocks, unsigned num_threads, void* shared_memory, size_t shared_bytes,
            void (*thread)(const void*), const void* argument, bool may_overlap) {
  if (num_threads == 0 || num_threads > kMaxThreads || num_blocks == 0) {
    throw std::runtime_error("simt: " + std::to_string(num_blocks) + " blocks of " +
                             std::to_string(num_threads) + " threads can't be launched");
  }
  const std::lock_guard<std::mutex> launch_lock(launch_mutex);
  const std::lock_guard<std::mutex> memory_lock(memory_mutex);
  const auto begin = reinterpret_cast<uintptr_t>(shared_memory);
  delete_shadow(shared);
  shared = {nullptr, begin, begin + shared_bytes, true, new_shadow(shared_bytes), {}, {}};
  body = thread;
  body_argument = argument;
  blocks = num_blocks;
  threads = num_threads;
  overlaps = may_overlap;
  first_run_of_launch = run + 1;
  if (!overlaps) first_run_of_chain = first_run_of_launch;
  error.clear();

  std::vector<unsigned> block_order(blocks), thread_order(threads);
  for (unsigned i = 0; i < blocks; ++i) block_order[i] = i;
  for (unsigned i = 0; i < threads; ++i) thread_order[i] = i;
  std::shuffle(block_order.begin(), block_order.end(), generator);
  for (unsigned i : block_order) {
    block = i;
    run_block(thread_order);
    if (error.empty()) continue;
    for (Fiber& fiber : fibers) fiber.created = false;  // left where they were, for good
    throw std::runtime_error("simt: " + error);
  }
  if (!counting) return;
  log_traffic(shared);
  for (const Memory& memory : memories) log_traffic(memory);
  ++num_launches;
}

void count_fill(const void* address, size_t bytes) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  if (!counting || bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const uint64_t sectors = (begin + bytes - 1) / kSectorBytes - begin / kSectorBytes + 1;
  traffic_log.push_back({num_launches++, begin, {0, bytes}, {0, sectors}, {0, sectors}});
}

unsigned thread_index() { return current_index(); }
unsigned num_threads() { return threads; }
unsigned block_index() { return block; }
unsigned num_blocks() { return blocks; }
bool in_kernel() { return current != nullptr; }

void wait_for_previous_launch() { current->waited = true; }

void sync_block() {
  if (++at_block_barrier == threads) {
    at_block_barrier = 0;
    ++block_epoch;
    for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  } else {
    current->state = State::kAtBlockBarrier;
    yield();
  }
}

void sync_warp() { exchange(0xffffffff, 0, true); }

uint64_t shuffle(uint32_t mask, uint64_t value, unsigned source) {
  const uint64_t* values = exchange(mask, value);
  if ((mask >> source % kWarpSize & 1) == 0) {
    fail("thread %u shuffles from lane %u, which is not in the mask %08x", current_index(), source,
         mask);
  }
  return values[source % kWarpSize];
}

uint32_t ballot(uint32_t mask, bool predicate) {
  const uint64_t* values = exchange(mask, predicate ? 1 : 0);
  uint32_t result = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if ((mask >> i & 1) != 0 && values[i] != 0) result |= uint32_t{1} << i;
  }
  return result;
}

uint32_t match(uint32_t mask, uint64_t value) {
  const uint64_t* values = exchange(mask, value);
  uint32_t result = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if ((mask >> i & 1) != 0 && values[i] == value) result |= uint32_t{1} << i;
  }
  return result;
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fail("thread %u of block %u accesses %zu bytes at %p, which is not a multiple", current_index(),
       block, bytes, address);
}

uint32_t atomic(uint32_t* address, const std::function<uint32_t(uint32_t)>& change) {
  on_access(address, sizeof(*address), true, true);
  const uint32_t old = *address;
  *address = change(old);
  return old;
}

void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  error = message;
  _longjmp(scheduler, 1);
}

void add_memory(const void* owner, const void* begin, size_t bytes, bool writable) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  const auto address = reinterpret_cast<uintptr_t>(begin);
  Shadow* shadow = writable ? new_shadow(bytes) : nullptr;
  memories.push_back({owner, address, address + bytes, writable, shadow, {}, {}});
}

void drop_memory(const void* owner) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  for (const Memory& memory : memories) {
    if (memory.owner == owner) delete_shadow(memory);
  }
  memories.erase(std::remove_if(memories.begin(), memories.end(),
                                [&](const Memory& memory) { return memory.owner == owner; }),
                 memories.end());
}

}  // namespace simt

// ---------------------------------------------------------------------------------------------
// What the compiler calls under -fsanitize=thread.

extern "C" {

// For the tests.
__attribute__((visibility("default"))) void simt_seed(uint32_t seed) {
  simt::generator.seed(seed + 1);
}

// Forgets what was counted, and counts from now on, or no longer.
__attribute__((visibility("default"))) void simt_count_traffic(bool enable) {
  const std::lock_guard<std::mutex> lock(simt::memory_mutex);
  simt::counting = enable;
  simt::num_launches = 0;
  simt::traffic_log.clear();
}
// Entry `index` of what was counted; false past the last.
__attribute__((visibility("default"))) bool simt_traffic(size_t index, simt::Traffic* traffic) {
  const std::lock_guard<std::mutex> lock(simt::memory_mutex);
  if (index >= simt::traffic_log.size()) return false;
  *traffic = simt::traffic_log[index];
  return true;
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define SIMT_ACCESS(SIZE)                                                          \
  void __tsan_read##SIZE(void* address) { simt::on_access(address, SIZE, false); } \
  void __tsan_write##SIZE(void* address) { simt::on_access(address, SIZE, true); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
#undef SIMT_ACCESS

// Of types that are not as aligned as they are large.
#define SIMT_UNALIGNED_ACCESS(SIZE)                                                \
  void __tsan_unaligned_read##SIZE(void* address) {                                \
    for (int i = 0; i < SIZE; ++i) __tsan_read1(static_cast<char*>(address) + i);  \
  }                                                                                \
  void __tsan_unaligned_write##SIZE(void* address) {                               \
    for (int i = 0; i < SIZE; ++i) __tsan_write1(static_cast<char*>(address) + i); \
  }
SIMT_UNALIGNED_ACCESS(2)
SIMT_UNALIGNED_ACCESS(4)
SIMT_UNALIGNED_ACCESS(8)
SIMT_UNALIGNED_ACCESS(16)
#undef SIMT_UNALIGNED_ACCESS

// The reference counts of the launching code; device code has atomics of its own.
int __tsan_atomic32_fetch_add(volatile int* address, int value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

void __tsan_read_range(void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) __tsan_read1(static_cast<char*>(address) + i);
}
void __tsan_write_range(void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) __tsan_write1(static_cast<char*>(address) + i);
}

// clang's.
void* __tsan_memset(void* target, int value, size_t bytes) {
  __tsan_write_range(target, bytes);
  return std::memset(target, value, bytes);
}
void* __tsan_memcpy(void* target, const void* source, size_t bytes) {
  __tsan_read_range(const_cast<void*>(source), bytes);
  __tsan_write_range(target, bytes);
  return std::memcpy(target, source, bytes);
}

}  // extern "C"

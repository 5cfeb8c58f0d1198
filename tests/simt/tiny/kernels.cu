// Kernels of a few lines, for the engine's own tests: right ones, and others that are wrong in one
// way. Two blocks of two warps each. See test_engine.py.

#include <cuda_runtime.h>

#undef NDEBUG
#include <cassert>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

namespace {

constexpr unsigned kThreads = 2 * simt::kWarpSize;
constexpr unsigned kBlocks = 2;
constexpr unsigned kWords = kBlocks * kThreads;  // of `in`, and of `out`
constexpr unsigned kAllLanes = 0xffffffff;

struct Params {
  const uint32_t* in;
  uint32_t* out;
};

uint32_t* shared() { return reinterpret_cast<uint32_t*>(dynamic_shared_memory); }
unsigned place() { return blockIdx.x * kThreads + threadIdx.x; }
unsigned lane() { return threadIdx.x % simt::kWarpSize; }
unsigned warp_begin() { return threadIdx.x - lane(); }

// ---------------------------------------------------------------------------------------------
// Right.

__global__ void copy(Params p) { p.out[place()] = p.in[place()]; }

__global__ void all_read_one(Params p) { p.out[place()] = p.in[0]; }

__global__ void reverse_block(Params p) {
  shared()[threadIdx.x] = p.in[place()];
  __syncthreads();
  p.out[place()] = shared()[kThreads - 1 - threadIdx.x];
}

__global__ void reverse_warp(Params p) {
  shared()[threadIdx.x] = p.in[place()];
  __syncwarp();
  p.out[place()] = shared()[warp_begin() + simt::kWarpSize - 1 - lane()];
}

__global__ void shuffle_warp(Params p) {
  p.out[place()] = __shfl_sync(kAllLanes, p.in[place()], simt::kWarpSize - 1 - lane());
}

__global__ void vote(Params p) { p.out[place()] = __ballot_sync(kAllLanes, lane() % 2 == 0); }

__global__ void count(Params p) { atomicAdd(&p.out[0], 1u); }

// Right, but who comes first is another thread under another seed.
__global__ void arrive(Params p) {
  const unsigned next = 1 + atomicAdd(&p.out[0], 1u);
  if (next < kWords) p.out[next] = place();
}

// Of what nobody has written.
__global__ void read_fresh_memory(Params p) { p.out[place()] = shared()[threadIdx.x]; }

__global__ void copy_first_block(Params p) {
  if (blockIdx.x == 0) copy(p);
}

// Launched after copy_first_block, with which it may overlap.
__global__ void wait_then_copy(Params p) {
  cudaGridDependencySynchronize();
  copy(p);
}

// Likewise: the second block's words are its own.
__global__ void copy_second_block_then_wait(Params p) {
  if (blockIdx.x == 1) copy(p);
  cudaGridDependencySynchronize();
}

// ---------------------------------------------------------------------------------------------
// Wrong.

__global__ void all_write_one(Params p) { p.out[blockIdx.x] = threadIdx.x; }

__global__ void blocks_write_one(Params p) {
  if (threadIdx.x == 0) p.out[0] = blockIdx.x;
}

__global__ void no_block_barrier(Params p) {
  shared()[threadIdx.x] = p.in[place()];
  __syncwarp();
  p.out[place()] = shared()[kThreads - 1 - threadIdx.x];  // the other warp's
}

__global__ void no_warp_barrier(Params p) {
  shared()[threadIdx.x] = p.in[place()];
  p.out[place()] = shared()[warp_begin() + simt::kWarpSize - 1 - lane()];
}

__global__ void a_vote_is_no_barrier(Params p) {
  shared()[threadIdx.x] = p.in[place()];
  __ballot_sync(kAllLanes, true);
  p.out[place()] = shared()[warp_begin() + simt::kWarpSize - 1 - lane()];
}

__global__ void atomic_and_plain(Params p) {
  if (threadIdx.x == 0) p.out[blockIdx.x] = 0;
  atomicAdd(&p.out[blockIdx.x], 1u);
}

__global__ void read_past_the_end(Params p) { p.out[place()] = p.in[place() + 1]; }

__global__ void write_past_the_end(Params p) { p.out[place() + 1] = 0; }

__global__ void write_what_is_const(Params p) { const_cast<uint32_t*>(p.in)[place()] = 0; }

__global__ void past_shared_memory(Params p) { p.out[place()] = shared()[threadIdx.x + 1]; }

__global__ void some_miss_the_block_barrier(Params p) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  p.out[place()] = 0;
}

__global__ void a_lane_misses_the_vote(Params p) {
  if (lane() == 5) return;
  p.out[place()] = __ballot_sync(kAllLanes, true);
}

__global__ void not_in_its_own_mask(Params p) { p.out[place()] = __ballot_sync(0xfffffffe, true); }

__global__ void masks_disagree(Params p) {
  p.out[place()] = __ballot_sync(lane() == 0 ? 0x00000003 : kAllLanes, true);
}

__global__ void shuffle_from_outside(Params p) {
  if (lane() < 16) p.out[place()] = __shfl_sync(0x0000ffff, 1u, 16);
}

__global__ void misaligned_vector(Params p) {
  p.out[place()] = __ldg(reinterpret_cast<const uint4*>(p.in + 1)).x;
}

__global__ void misaligned_word(Params p) {
  const auto* bytes = reinterpret_cast<const char*>(p.in);
  p.out[place()] = *reinterpret_cast<const uint32_t*>(bytes + 2);
}

__global__ void assertion(Params p) { assert(p.in[place()] == 0 && "all are zero"); }

__global__ void does_not_wait(Params) {}

__global__ void writes_before_it_waits(Params p) {
  copy(p);
  cudaGridDependencySynchronize();
}

__global__ void reads_before_it_waits(Params p) {
  const uint32_t word = p.out[place()];
  cudaGridDependencySynchronize();
  p.out[place()] = word;
}

#define NAMED(kernel) {#kernel, kernel}
const std::map<std::string, void (*)(Params)> kernels = {
    NAMED(copy),
    NAMED(all_read_one),
    NAMED(reverse_block),
    NAMED(reverse_warp),
    NAMED(shuffle_warp),
    NAMED(vote),
    NAMED(count),
    NAMED(arrive),
    NAMED(read_fresh_memory),
    NAMED(wait_then_copy),
    NAMED(copy_second_block_then_wait),
    NAMED(all_write_one),
    NAMED(blocks_write_one),
    NAMED(no_block_barrier),
    NAMED(no_warp_barrier),
    NAMED(a_vote_is_no_barrier),
    NAMED(atomic_and_plain),
    NAMED(read_past_the_end),
    NAMED(write_past_the_end),
    NAMED(write_what_is_const),
    NAMED(past_shared_memory),
    NAMED(some_miss_the_block_barrier),
    NAMED(a_lane_misses_the_vote),
    NAMED(not_in_its_own_mask),
    NAMED(masks_disagree),
    NAMED(shuffle_from_outside),
    NAMED(misaligned_vector),
    NAMED(misaligned_word),
    NAMED(assertion),
    NAMED(does_not_wait),
    NAMED(writes_before_it_waits),
    NAMED(reads_before_it_waits),
};

std::string error;

}  // namespace

// Returns what the engine has to say, or "". Both arrays have kWords. A kernel that overlaps
// follows copy_first_block.
extern "C" __attribute__((visibility("default"))) const char* tiny_run(const char* name,
                                                                       const uint32_t* in,
                                                                       uint32_t* out,
                                                                       bool overlaps) {
  error.clear();
  simt::add_memory(in, in, kWords * sizeof(uint32_t), false);
  simt::add_memory(out, out, kWords * sizeof(uint32_t), true);
  cudaLaunchAttribute overlap{};
  cudaLaunchConfig_t config{};
  config.gridDim = kBlocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kThreads * sizeof(uint32_t);
  config.attrs = &overlap;
  // As a caller must who may be the first to launch a kernel while a graph is captured.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  try {
    if (overlaps) cudaLaunchKernelEx(&config, copy_first_block, Params{in, out});
    config.numAttrs = overlaps;
    const cudaError_t status = cudaLaunchKernelEx(&config, kernels.at(name), Params{in, out});
    if (status != cudaSuccess) error = cudaGetErrorString(status);
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  simt::drop_memory(in);
  simt::drop_memory(out);
  return error.c_str();
}

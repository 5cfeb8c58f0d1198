// Shaders of a few lines, for the engine's own tests: right ones, and others that are wrong in one
// way. See launches.mm.

#include <metal_stdlib>

using namespace metal;

struct Params {
  uint count;
  uint summand;
};

[[kernel]] void add(device uint* data [[buffer(0)]], constant Params& params [[buffer(1)]],
                    uint threadgroup_index [[threadgroup_position_in_grid]],
                    uint thread_index [[thread_position_in_threadgroup]],
                    uint num_threads [[threads_per_threadgroup]]) {
  const uint i = threadgroup_index * num_threads + thread_index;
  if (i < params.count) data[i] += params.summand;
}

[[kernel]] void take_turns(device uint* data [[buffer(0)]], constant Params& params [[buffer(1)]],
                           uint threadgroup_index [[threadgroup_position_in_grid]],
                           uint threadgroups [[threadgroups_per_grid]],
                           uint thread_index [[thread_position_in_threadgroup]]) {
  if (thread_index > 0) return;
  for (uint i = threadgroup_index; i < params.count; i += threadgroups) data[i] += params.summand;
}

[[kernel]] void reverse(device uint* data [[buffer(0)]],
                        threadgroup uint* memory [[threadgroup(0)]],
                        uint thread_index [[thread_position_in_threadgroup]],
                        uint num_threads [[threads_per_threadgroup]]) {
  memory[thread_index] = data[thread_index];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  data[thread_index] = memory[num_threads - 1 - thread_index];
}

[[kernel]] void no_barrier(device uint* data [[buffer(0)]],
                           threadgroup uint* memory [[threadgroup(0)]],
                           uint thread_index [[thread_position_in_threadgroup]],
                           uint num_threads [[threads_per_threadgroup]]) {
  memory[thread_index] = data[thread_index];
  data[thread_index] = memory[num_threads - 1 - thread_index];
}

[[kernel]] void past_the_end(device uint* data [[buffer(0)]], constant Params& params [[buffer(1)]],
                             uint thread_index [[thread_position_in_threadgroup]]) {
  data[params.count + thread_index] = 0;
}

[[kernel]] void a_lane_misses_the_vote(device uint* data [[buffer(0)]],
                                       uint thread_index [[thread_position_in_threadgroup]],
                                       uint lane [[thread_index_in_simdgroup]]) {
  if (lane == 5) return;
  data[thread_index] = static_cast<uint>(static_cast<simd_vote::vote_t>(simd_ballot(true)));
}

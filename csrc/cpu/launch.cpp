// The CPU's launchers: which instruction set, and how the work is split over threads.
//
// Memory traffic. Forward: reads the residual and the ids, writes the output; the table's rows in
// use (about 100 for an image) stay in the cache. Backward: reads the gradient, writes the table's
// gradient, of which all but those rows are zeros; the sums stay in the cache.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "capability.h"

namespace embedding_lookup {
namespace {

// The best instruction set of this CPU, capped by the variable with which PyTorch's own kernels are
// capped: ATEN_CPU_CAPABILITY is "default", "avx2" or "avx512".
const CpuKernels& select_kernels() {
#ifdef EMBEDDING_LOOKUP_X86_DISPATCH
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string cap = variable != nullptr ? variable : "avx512";
  const bool allow_avx2 = cap != "default";
  const bool allow_avx512 = allow_avx2 && cap != "avx2";
  if (allow_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (allow_avx2 && __builtin_cpu_supports("avx2")) return kAvx2;  // F16C came before AVX2
#endif
  return kBaseline;
}

const CpuKernels& kernels() {
  static const CpuKernels& selected = select_kernels();
  return selected;
}

// A fresh result of this many bytes or more is worth huge pages.
constexpr int64_t kHugePage = int64_t{2} << 20;

// The page faults of a fresh 60 MiB result cost several times what writing it does. Asking for huge
// pages, as PyTorch's allocator does with THP_MEM_ALLOC_ENABLE=1, saves most of that. It is advice:
// whether it is taken changes nothing but the time.
void advise_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// With a residual as large, a result of this size has no place in the level 3 cache that a few
// cores share on most CPUs, so it is written past the caches. (The size that the system reports is
// no guide: on a virtual machine it is all of the host's.)
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// Elements below which a thread is not worth waking.
constexpr int64_t kGrainElements = 32768;

// The backward's sums of one block of columns should fit this: half of a small level 2 cache.
constexpr int64_t kCacheBytes = int64_t{512} << 10;

// The least columns in a block: 128 bytes of a 16-bit gradient.
constexpr int64_t kMinWidth = 64;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t element_size(ScalarType dtype) {
  if (dtype == ScalarType::Double) return 8;
  return dtype == ScalarType::Float ? 4 : 2;
}

// Becomes an IndexError in Python.
[[noreturn]] void throw_id_too_large(const Lookup& lookup, int64_t position) {
  const int64_t token = position / lookup.num_axes;
  const int64_t axis = position % lookup.num_axes;
  std::ostringstream message;
  message << "fused_embedding_lookup: position_ids must be less than the " << lookup.num_rows
          << " rows of the table, got " << TokenCursor(lookup, token).id(axis) << " on axis "
          << axis << " of token " << token;
  throw std::out_of_range(message.str());
}

// Numbers the (axis, row) pairs in use, in the order in which the tokens meet them. `slots`
// [num_tokens, K] gets each token's numbers (-1: reads nothing), `slot_of_row` [K, num_rows] the
// number of each row (-1: not in use). Returns how many there are.
int64_t number_rows(const Lookup& lookup, int32_t* slots, int32_t* slot_of_row) {
  std::fill_n(slot_of_row, lookup.num_axes * lookup.num_rows, -1);
  int32_t num_slots = 0;
  TokenCursor cursor(lookup, 0);
  for (int64_t token = 0; token < lookup.num_tokens; ++token, cursor.next()) {
    const bool is_padding = cursor.is_padding();
    for (int64_t axis = 0; axis < lookup.num_axes; ++axis) {
      const int64_t row = cursor.row(axis);
      if (row >= lookup.num_rows) throw_id_too_large(lookup, token * lookup.num_axes + axis);
      int32_t slot = -1;
      if (!is_padding && row >= 0) {
        int32_t& numbered = slot_of_row[axis * lookup.num_rows + row];
        if (numbered < 0) numbered = num_slots++;
        slot = numbered;
      }
      *slots++ = slot;
    }
  }
  return num_slots;
}

}  // namespace

std::string cpu_capability() { return kernels().name; }

void launch_forward(const Forward& params, const ForwardTensors& /*tensors*/) {
  const Lookup& lookup = params.lookup;
  const int64_t row_bytes = lookup.hidden * element_size(params.out_dtype);
  const int64_t out_bytes = lookup.num_tokens * row_bytes;
  const bool stream = out_bytes >= kStreamBytes && row_bytes % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(params.out) % 64 == 0;
  advise_huge_pages(params.out, out_bytes);
  // The error names the first id that is too large, whichever thread finds one first.
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad{kNone};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / lookup.hidden);
  torch::stable::parallel_for(0, lookup.num_tokens, grain, [&](int64_t begin, int64_t end) {
    const int64_t bad = kernels().forward(params, begin, end, stream);
    if (bad < 0) return;
    int64_t seen = first_bad.load();
    while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  if (first_bad.load() != kNone) throw_id_too_large(lookup, first_bad.load());
}

// Each task owns a block of columns and adds every token's gradient to the sums of the rows that
// the token reads, in the order of the tokens: no two threads share a sum. A block is as wide as
// the columns divide over the threads, but narrow enough for the sums to stay in the cache; if that
// leaves columns over (thousands of distinct ids), there is another pass. Then all threads share
// out the rows of the result.
//
// Workspace: the sums, at most kCacheBytes a thread (or kMinWidth columns of them, if that is
// more), and 4 bytes per id and per row of the table.
void launch_backward(const Backward& params, const BackwardTensors& tensors) {
  const Lookup& lookup = params.lookup;
  const int64_t hidden = lookup.hidden;
  const int64_t table_rows = lookup.num_axes * lookup.num_rows;
  check(table_rows <= std::numeric_limits<int32_t>::max(), "table must have at most ",
        std::numeric_limits<int32_t>::max(), " rows for the backward on the CPU, got ", table_rows);
  const int64_t element = element_size(params.table_dtype);
  auto* grad_table = static_cast<char*>(params.grad_table);
  advise_huge_pages(grad_table, table_rows * hidden * element);

  Tensor slots_tensor = torch::stable::new_empty(
      tensors.grad, {lookup.num_tokens * lookup.num_axes}, ScalarType::Int);
  Tensor slot_of_row_tensor = torch::stable::new_empty(tensors.grad, {table_rows}, ScalarType::Int);
  auto* slots = static_cast<int32_t*>(slots_tensor.mutable_data_ptr());
  auto* slot_of_row = static_cast<int32_t*>(slot_of_row_tensor.mutable_data_ptr());
  const int64_t num_slots = number_rows(lookup, slots, slot_of_row);

  const int64_t sum_bytes = element == 2 ? 4 : 8;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t width_by_threads = (hidden + threads - 1) / threads;
  const int64_t width_by_cache = kCacheBytes / (std::max<int64_t>(num_slots, 1) * sum_bytes);
  // From kMinWidth up: with enough distinct ids, not one column of sums fits the cache.
  const int64_t width = std::min(
      hidden,
      round_up(std::max<int64_t>(std::min(width_by_threads, width_by_cache), 1), kMinWidth));
  const int64_t blocks_per_pass = std::min(threads, (hidden + width - 1) / width);
  const int64_t block_bytes = num_slots * width * sum_bytes;
  Tensor sums_tensor =
      torch::stable::new_empty(tensors.grad, {blocks_per_pass * block_bytes}, ScalarType::Byte);
  auto* sums = static_cast<char*>(sums_tensor.mutable_data_ptr());
  advise_huge_pages(sums, blocks_per_pass * block_bytes);

  for (int64_t pass = 0; pass < hidden; pass += blocks_per_pass * width) {
    const int64_t blocks = std::min(blocks_per_pass, (hidden - pass + width - 1) / width);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t column = pass + block * width;
        char* block_sums = sums + block * block_bytes;
        std::fill_n(block_sums, block_bytes, char{0});
        kernels().accumulate(params, slots, column, std::min(width, hidden - column), block_sums);
      }
    });
    const int64_t grain = std::max<int64_t>(1, kGrainElements / hidden);
    torch::stable::parallel_for(0, table_rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        char* out = grad_table + row * hidden * element;
        const int64_t slot = slot_of_row[row];
        if (slot < 0) {
          if (pass == 0) std::fill_n(out, hidden * element, char{0});
          continue;
        }
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t column = pass + block * width;
          const int64_t count = std::min(width, hidden - column);
          const char* row_sums = sums + block * block_bytes + slot * count * sum_bytes;
          kernels().store(params, row_sums, count, out + column * element);
        }
      }
    });
  }
}

}  // namespace embedding_lookup

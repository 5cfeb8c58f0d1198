// Which instruction set, and what the launchers share.

#include "capability.h"

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

}  // namespace

const CpuKernels& kernels() {
  static const CpuKernels& selected = select_kernels();
  return selected;
}

std::string cpu_capability() { return kernels().name; }

void advise_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr int64_t kHugePage = int64_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void populate(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, of Linux 5.14
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite);
#endif
}

void throw_id_too_large(const Lookup& lookup, int64_t entry) {
  const int64_t token = entry / lookup.num_entries;
  const int64_t k = entry % lookup.num_entries;
  std::ostringstream message;
  message << "fused_embedding_lookup: position_ids must be less than the " << lookup.num_rows
          << " rows of the table, got " << read_id(lookup, token_offsets(lookup, token), k)
          << " on axis " << k << " of token " << token;
  throw std::out_of_range(message.str());
}

}  // namespace embedding_lookup

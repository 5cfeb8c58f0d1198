// The forward's launcher: each thread gets a range of tokens.
//
// Memory traffic: reads the residual, the ids and the weights, writes the output; the table's rows
// in use stay in the cache, all of them for an image.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "capability.h"

namespace embedding_lookup {

void launch_forward(const Lookup& lookup, torch::stable::Device /*device*/) {
  auto* out = lookup.out.data<char>();
  const int64_t token_bytes = lookup.num_columns * element_size(lookup.out.dtype);
  const int64_t out_bytes = lookup.num_tokens * token_bytes;
  const bool stream = out_bytes >= kStreamBytes && token_bytes % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(out) % 64 == 0;
  advise_huge_pages(out, out_bytes);
  // The error names the first id that is too large, whichever thread finds one first.
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad{kNone};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / lookup.num_columns);
  torch::stable::parallel_for(0, lookup.num_tokens, grain, [&](int64_t begin, int64_t end) {
    if (out_bytes >= kFreshBytes) populate(out + begin * token_bytes, (end - begin) * token_bytes);
    const int64_t bad = kernels().forward(lookup, begin, end, stream);
    if (bad < 0) return;
    int64_t seen = first_bad.load();
    while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  if (first_bad.load() != kNone) throw_id_too_large(lookup, first_bad.load());
}

}  // namespace embedding_lookup

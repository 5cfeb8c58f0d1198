// The third op's launcher: each thread gets a range of the pixels.
//
// Memory traffic: reads the pixels and writes the result, once.

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "capability.h"
#include "pixel_scaling.h"

namespace embedding_lookup {

void launch_scaling(const Scaling& scaling, torch::stable::Device /*device*/) {
  // Ranges begin at multiples of this, so that each is as aligned as the result.
  constexpr int64_t kUnit = 1024;
  auto* out = scaling.out.data<char>();
  const int64_t size = element_size(scaling.out.dtype);
  const int64_t out_bytes = scaling.count * size;
  const bool stream = out_bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  advise_huge_pages(out, out_bytes);
  const int64_t units = (scaling.count + kUnit - 1) / kUnit;
  torch::stable::parallel_for(0, units, kGrainElements / kUnit, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kUnit;
    const int64_t end = std::min(last * kUnit, scaling.count);
    if (out_bytes >= kFreshBytes) populate(out + begin * size, (end - begin) * size);
    kernels().scale(scaling, begin, end, stream);
  });
}

}  // namespace embedding_lookup

// The kernels for any CPU: the baseline of the architecture that the compiler targets.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "capability.h"

#define CPU_CAPABILITY baseline
#define CPU_VECTOR_BYTES 16
#include "kernels.h"

namespace embedding_lookup {
const CpuKernels kBaseline = {"default",       baseline::forward, baseline::accumulate,
                              baseline::store, baseline::gather,  baseline::clear,
                              baseline::scale};
}

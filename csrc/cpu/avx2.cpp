// The kernels for x86-64 with AVX2.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "capability.h"

#ifdef EMBEDDING_LOOKUP_X86_DISPATCH
#include <immintrin.h>

#pragma GCC target("avx2,f16c")
#define CPU_CAPABILITY avx2
#define CPU_VECTOR_BYTES 32
#include "kernels.h"

namespace embedding_lookup {
const CpuKernels kAvx2 = {"avx2",       avx2::forward, avx2::accumulate, avx2::store,
                          avx2::gather, avx2::clear,   avx2::scale};
}
#endif

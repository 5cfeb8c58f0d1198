// The kernels for x86-64 with AVX-512 (F, BW, CD, DQ, VL: Skylake-SP, Zen 4 and later).

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "capability.h"

#ifdef EMBEDDING_LOOKUP_X86_DISPATCH
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,f16c")
#define CPU_CAPABILITY avx512
#define CPU_VECTOR_BYTES 64
#include "kernels.h"

namespace embedding_lookup {
const CpuKernels kAvx512 = {"avx512",       avx512::forward, avx512::accumulate, avx512::store,
                            avx512::gather, avx512::clear,   avx512::scale};
}
#endif

// The CPU's kernels for one instruction set. How threads map to data is the launchers' business.
//
// No include guard: baseline.cpp, avx2.cpp and avx512.cpp each include this once, with
// CPU_CAPABILITY naming their namespace, CPU_VECTOR_BYTES the width of a vector register and the
// compiler set to their instruction set. All of it has internal linkage and calls no function
// template from outside, or the linker could keep one instruction set's copy of it for everyone.
// For the same reason every other header comes first.

// In this order: each needs those above it. The empty comments keep clang-format from sorting.
#include "vectors.h"
//
#include "forward_kernels.h"
//
#include "backward_kernels.h"
//
#include "scaling_kernels.h"

/// \file
/// Defines `avx512_kernels()`: the loops of `kernels.h` for processors with AVX-512 (x86-64-v4).
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")
#endif

namespace chatflow::cpu {
namespace {
#define CHATFLOW_ISA_NAME "AVX-512"
#include "lanes.h"
#include "loops.h"
}  // namespace

const Kernels& avx512_kernels() { return kTable; }

}  // namespace chatflow::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

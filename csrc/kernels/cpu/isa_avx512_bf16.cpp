/// \file
/// Defines `avx512_bf16_kernels()`: the loops of `kernels.h` for processors with AVX-512 and its
/// bf16 conversion.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bf16,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bf16,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")
#endif

namespace chatflow::cpu {
namespace {
#define CHATFLOW_ISA_NAME "AVX-512 with bf16"
#define CHATFLOW_ROUND(values) ((Halves)_mm512_cvtneps_pbh((__m512)(values)))
#include "lanes.h"
#include "loops.h"
}  // namespace

const Kernels& avx512_bf16_kernels() { return kTable; }

}  // namespace chatflow::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

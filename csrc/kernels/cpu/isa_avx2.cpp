/// \file
/// Defines `avx2_kernels()`: the loops of `kernels.h` for processors with AVX2 and FMA (x86-64-v3).
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif

namespace chatflow::cpu {
namespace {
#define CHATFLOW_ISA_NAME "AVX2"
#include "lanes.h"
#include "loops.h"
}  // namespace

const Kernels& avx2_kernels() { return kTable; }

}  // namespace chatflow::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

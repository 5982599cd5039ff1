/// \file
/// Defines `portable_kernels()`: the loops of `kernels.h` for any processor.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace chatflow::cpu {
namespace {
#define CHATFLOW_ISA_NAME "portable"
#include "lanes.h"
#include "loops.h"
}  // namespace

const Kernels& portable_kernels() { return kTable; }

}  // namespace chatflow::cpu

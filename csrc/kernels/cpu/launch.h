/// \file
/// Multithreaded kernels over all rows.
///
/// Rows are split into blocks independently of the number of threads, and reductions over rows add
/// the partial sums of the blocks in order, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace chatflow::cpu {

void launch(const Exponentiate& arguments, std::int64_t rows, int threads);
void launch(const RmsNorm& arguments, std::int64_t rows, int threads);
/// Overwrites `grad_weight` with the sum over all rows.
void launch(const RmsNormBackward& arguments, std::int64_t rows, int threads);
void launch(const SwiGlu& arguments, std::int64_t rows, int threads);
void launch(const SwiGluBackward& arguments, std::int64_t rows, int threads);
void launch(const Rotate& arguments, std::int64_t rows, int threads);
void launch(const CausalSoftmax& arguments, std::int64_t rows, int threads);
void launch(const CausalSoftmaxBackward& arguments, std::int64_t rows, int threads);

}  // namespace chatflow::cpu

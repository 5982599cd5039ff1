/// \file
/// The kernels over all rows, on several threads.
///
/// In: the structures of `kernels.h`, the number of rows and of threads. Out: all rows. Rows are
/// cut into blocks that do not depend on the number of threads, and sums over rows add the blocks'
/// sums in order, so a result is the same for any number.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace chatflow::cpu {

void launch(const Exponentiate& arguments, std::int64_t rows, int threads);
void launch(const RmsNorm& arguments, std::int64_t rows, int threads);
/// `grad_weight` is overwritten by the sum over all rows.
void launch(const RmsNormBackward& arguments, std::int64_t rows, int threads);
void launch(const SwiGlu& arguments, std::int64_t rows, int threads);
void launch(const SwiGluBackward& arguments, std::int64_t rows, int threads);
void launch(const Rotate& arguments, std::int64_t rows, int threads);
void launch(const CausalSoftmax& arguments, std::int64_t rows, int threads);
void launch(const CausalSoftmaxBackward& arguments, std::int64_t rows, int threads);

}  // namespace chatflow::cpu

/// \file
/// Distributes rows over OpenMP threads and selects the instruction set. Without OpenMP, the same
/// blocks run one after another.
#include "launch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

namespace chatflow::cpu {

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16_kernels());
  if (avx512) found.push_back(&avx512_kernels());
  if (avx2) found.push_back(&avx2_kernels());
#endif
  found.push_back(&portable_kernels());
  return found;
}

namespace {

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> chosen{runnable_kernels().front()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

void use_kernels(const std::string& name) {
  for (const Kernels* table : runnable_kernels()) {
    if (table->name == name) {
      in_use() = table;
      return;
    }
  }
  throw std::invalid_argument("kernels: this processor runs none named " + name);
}

namespace {

/// Number of row blocks: enough to balance threads of unequal speed.
constexpr std::int64_t kNumBlocks = 64;

/// Calls `work(block, begin, end)` for each block of the rows.
template <typename Work>
void for_blocks(std::int64_t rows, int threads, Work work) {
  const std::int64_t size = (rows + kNumBlocks - 1) / kNumBlocks;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t block = 0; block < kNumBlocks; ++block) {
    const std::int64_t begin = block * size, end = std::min(rows, begin + size);
    if (begin < end) work(block, begin, end);
  }
}

template <typename Arguments>
void run(void (*kernel)(const Arguments&, std::int64_t, std::int64_t), const Arguments& arguments,
         std::int64_t rows, int threads) {
  for_blocks(rows, threads, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    kernel(arguments, begin, end);
  });
}

}  // namespace

void launch(const Exponentiate& arguments, std::int64_t rows, int threads) {
  run(kernels().exponentiate, arguments, rows, threads);
}

void launch(const RmsNorm& arguments, std::int64_t rows, int threads) {
  run(kernels().rms_norm, arguments, rows, threads);
}

void launch(const RmsNormBackward& arguments, std::int64_t rows, int threads) {
  const std::int64_t n = arguments.row_size;
  std::vector<float> parts(kNumBlocks * n);
  for_blocks(rows, threads, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    RmsNormBackward own = arguments;
    own.grad_weight = parts.data() + block * n;
    kernels().rms_norm_backward(own, begin, end);
  });
  std::fill_n(arguments.grad_weight, n, 0.0f);
  for (std::int64_t block = 0; block < kNumBlocks; ++block) {
    for (std::int64_t i = 0; i < n; ++i) arguments.grad_weight[i] += parts[block * n + i];
  }
}

void launch(const SwiGlu& arguments, std::int64_t rows, int threads) {
  run(kernels().swiglu, arguments, rows, threads);
}

void launch(const SwiGluBackward& arguments, std::int64_t rows, int threads) {
  run(kernels().swiglu_backward, arguments, rows, threads);
}

void launch(const Rotate& arguments, std::int64_t rows, int threads) {
  run(kernels().rotate, arguments, rows, threads);
}

void launch(const CausalSoftmax& arguments, std::int64_t rows, int threads) {
  run(kernels().causal_softmax, arguments, rows, threads);
}

void launch(const CausalSoftmaxBackward& arguments, std::int64_t rows, int threads) {
  run(kernels().causal_softmax_backward, arguments, rows, threads);
}

}  // namespace chatflow::cpu

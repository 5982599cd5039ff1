/**
 * @file rms_norm.cuh
 * @brief RMSNorm and its gradients; see kernels.h for what is computed.
 *
 * A block owns a row and holds it in registers between the sum and its use, so every array is read
 * and written once. In the backward pass a block goes through every num_partials-th row and keeps
 * its share of the weight's gradient in registers.
 */
#pragma once

#include "device.cuh"

namespace chatflow {

constexpr int kNormPacks = 4;  // of a row, held by each thread
constexpr int kNormThreads = kMaxNormPacks / kNormPacks;
constexpr int kColumnThreads = 32;  // of a block that adds up partials; neighbours read neighbours
constexpr int kColumnRows = 8;

template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_forward_kernel(const T* x, const T* residual, const T* weight, T* y, T* sum,
                            float* rstd, int64_t hidden, float epsilon) {
  __shared__ float scratch[kMaxWarps];
  const int64_t row = blockIdx.x;
  const int num_packs = static_cast<int>(hidden / kPack<T>);
  Pack<T> held[kNormPacks];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kNormPacks; ++i) {
    const int pack = threadIdx.x + i * blockDim.x;
    if (pack >= num_packs) break;
    held[i] = load(x + row * hidden, pack);
    if (residual != nullptr) {
      const Pack<T> other = load(residual + row * hidden, pack);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        held[i].values[k] = from_float<T>(to_float(held[i].values[k]) + to_float(other.values[k]));
      }
      store(sum + row * hidden, pack, held[i]);
    }
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const float value = to_float(held[i].values[k]);
      squares += value * value;
    }
  }
  const float scale =
      1.0f / sqrtf(block_sum(squares, scratch) / static_cast<float>(hidden) + epsilon);
  if (threadIdx.x == 0) {
    rstd[row] = scale;
  }
#pragma unroll
  for (int i = 0; i < kNormPacks; ++i) {
    const int pack = threadIdx.x + i * blockDim.x;
    if (pack >= num_packs) break;
    const Pack<T> factor = load(weight, pack);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      held[i].values[k] =
          from_float<T>(to_float(held[i].values[k]) * scale * to_float(factor.values[k]));
    }
    store(y + row * hidden, pack, held[i]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_backward_kernel(const T* grad_y, const T* grad_sum, const T* s, const T* weight,
                             const float* rstd, T* grad_s, float* partials, int64_t num_rows,
                             int64_t hidden) {
  __shared__ float scratch[kMaxWarps];
  const int num_packs = static_cast<int>(hidden / kPack<T>);
  float grad_weight[kNormPacks][kPack<T>] = {};
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const float scale = rstd[row];
    Pack<T> gradients[kNormPacks];
    Pack<T> inputs[kNormPacks];
    float product = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormPacks; ++i) {
      const int pack = threadIdx.x + i * blockDim.x;
      if (pack >= num_packs) break;
      gradients[i] = load(grad_y + row * hidden, pack);
      inputs[i] = load(s + row * hidden, pack);
      const Pack<T> factor = load(weight, pack);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const float gradient = to_float(gradients[i].values[k]);
        const float unit = to_float(inputs[i].values[k]) * scale;
        grad_weight[i][k] += gradient * unit;
        product += gradient * to_float(factor.values[k]) * unit;
      }
    }
    const float mean = block_sum(product, scratch) / static_cast<float>(hidden);
#pragma unroll
    for (int i = 0; i < kNormPacks; ++i) {
      const int pack = threadIdx.x + i * blockDim.x;
      if (pack >= num_packs) break;
      const Pack<T> factor = load(weight, pack);
      Pack<T> past = {};
      if (grad_sum != nullptr) {
        past = load(grad_sum + row * hidden, pack);
      }
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const float unit = to_float(inputs[i].values[k]) * scale;
        const float gradient = to_float(gradients[i].values[k]) * to_float(factor.values[k]);
        past.values[k] = from_float<T>(scale * (gradient - unit * mean) + to_float(past.values[k]));
      }
      store(grad_s + row * hidden, pack, past);
    }
  }
#pragma unroll
  for (int i = 0; i < kNormPacks; ++i) {
    const int pack = threadIdx.x + i * blockDim.x;
    if (pack >= num_packs) break;
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      partials[blockIdx.x * hidden + pack * kPack<T> + k] = grad_weight[i][k];
    }
  }
}

/** @brief Adds the partials of 32 columns: 8 threads a column take every 8th partial. */
template <typename T>
__global__ void __launch_bounds__(kColumnThreads* kColumnRows)
    add_partials_kernel(const float* partials, T* total, int64_t hidden, int64_t num_partials) {
  __shared__ float sums[kColumnRows][kColumnThreads];
  const int lane = threadIdx.x % kColumnThreads;
  const int first = threadIdx.x / kColumnThreads;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnThreads + lane;
  float sum = 0.0f;
  for (int64_t i = first; column < hidden && i < num_partials; i += kColumnRows) {
    sum += partials[i * hidden + column];
  }
  sums[first][lane] = sum;
  __syncthreads();
  if (first == 0 && column < hidden) {
    for (int i = 1; i < kColumnRows; ++i) {
      sum += sums[i][lane];
    }
    total[column] = from_float<T>(sum);
  }
}

template <typename T>
bool is_norm_row(int64_t hidden) {
  return is_whole_packs<T>(hidden) && hidden / kPack<T> <= kMaxNormPacks;
}

/** @brief Threads of a block that holds a row. */
template <typename T>
int norm_block_size(int64_t hidden) {
  return block_size((hidden / kPack<T> + kNormPacks - 1) / kNormPacks, kNormThreads);
}

template <typename T>
int rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* sum,
                     float* rstd, int64_t num_rows, int64_t hidden, float epsilon, void* stream) {
  if (!is_norm_row<T>(hidden) || !are_aligned(x, residual, weight, y, sum)) {
    return kInvalidValue;
  }
  return launch(rms_norm_forward_kernel<T>, num_rows, norm_block_size<T>(hidden), stream,
                static_cast<const T*>(x), static_cast<const T*>(residual),
                static_cast<const T*>(weight), static_cast<T*>(y), static_cast<T*>(sum), rstd,
                hidden, epsilon);
}

template <typename T>
int rms_norm_backward(const void* grad_y, const void* grad_sum, const void* s, const void* weight,
                      const float* rstd, void* grad_s, float* partials, void* grad_weight,
                      int64_t num_rows, int64_t hidden, int64_t num_partials, void* stream) {
  if (!is_norm_row<T>(hidden) || !are_aligned(grad_y, grad_sum, s, weight, grad_s)) {
    return kInvalidValue;
  }
  const int error = launch(rms_norm_backward_kernel<T>, num_partials, norm_block_size<T>(hidden),
                           stream, static_cast<const T*>(grad_y), static_cast<const T*>(grad_sum),
                           static_cast<const T*>(s), static_cast<const T*>(weight), rstd,
                           static_cast<T*>(grad_s), partials, num_rows, hidden);
  if (error != 0) {
    return error;
  }
  return launch(add_partials_kernel<T>, (hidden + kColumnThreads - 1) / kColumnThreads,
                kColumnThreads * kColumnRows, stream, static_cast<const float*>(partials),
                static_cast<T*>(grad_weight), hidden, num_partials);
}

}  // namespace chatflow

#define CHATFLOW_DEFINE_RMS_NORM(SUFFIX, T)                                                        \
  int chatflow_rms_norm_forward_##SUFFIX(const void* x, const void* residual, const void* weight,  \
                                         void* y, void* sum, float* rstd, int64_t num_rows,        \
                                         int64_t hidden, float epsilon, void* stream) {            \
    return chatflow::rms_norm_forward<T>(x, residual, weight, y, sum, rstd, num_rows, hidden,      \
                                         epsilon, stream);                                         \
  }                                                                                                \
  int chatflow_rms_norm_backward_##SUFFIX(const void* grad_y, const void* grad_sum, const void* s, \
                                          const void* weight, const float* rstd, void* grad_s,     \
                                          float* partials, void* grad_weight, int64_t num_rows,    \
                                          int64_t hidden, int64_t num_partials, void* stream) {    \
    return chatflow::rms_norm_backward<T>(grad_y, grad_sum, s, weight, rstd, grad_s, partials,     \
                                          grad_weight, num_rows, hidden, num_partials, stream);    \
  }

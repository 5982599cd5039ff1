/**
 * @file cross_entropy.cuh
 * @brief The two passes over logits of a vocabulary-parallel cross-entropy; see kernels.h.
 *
 * Between them the slices' highest logits and sums are reduced over the tensor-parallel ranks. The
 * first pass goes through a row once (Milakov and Gimelshein, "Online normalizer calculation for
 * softmax", 2018); the second writes the gradient over the logits, each entry rounded once.
 */
#pragma once

#include "device.cuh"

namespace chatflow {

constexpr int kSoftmaxThreads = 512;
constexpr float kLowest = -1e30f;  // below every logit, and finite: differences stay numbers

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_statistics_kernel(const T* logits, const int64_t* labels, float* highest, float* sum,
                              float* target, int64_t num_columns, int64_t num_valid_tokens) {
  __shared__ float scratch[kMaxWarps];
  const int64_t row = blockIdx.x;
  const T* values = logits + row * num_columns;
  float top = kLowest;
  float total = 0.0f;
  for (int64_t pack = threadIdx.x; pack * kPack<T> < num_valid_tokens; pack += blockDim.x) {
    const Pack<T> held = load(values, pack);
    const int64_t left = num_valid_tokens - pack * kPack<T>;
    float pack_top = top;
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      if (k < left) pack_top = fmaxf(pack_top, to_float(held.values[k]));
    }
    total *= expf(top - pack_top);
    top = pack_top;
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      if (k < left) total += expf(to_float(held.values[k]) - top);
    }
  }
  const float row_top = block_max(top, scratch);
  const float row_total = block_sum(total * expf(top - row_top), scratch);
  if (threadIdx.x == 0) {
    const int64_t label = labels[row];
    highest[row] = row_top;
    sum[row] = row_total;
    target[row] = label >= 0 && label < num_valid_tokens ? to_float(values[label]) : 0.0f;
  }
}

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_gradient_kernel(T* logits, const int64_t* labels, const float* highest,
                            const float* sum, const float* scale, int64_t num_columns,
                            int64_t num_valid_tokens) {
  const int64_t row = blockIdx.x;
  T* values = logits + row * num_columns;
  const int64_t label = labels[row];
  const float top = highest[row];
  const float inverse = 1.0f / sum[row];
  const float factor = scale[row];
  for (int64_t pack = threadIdx.x; pack < num_columns / kPack<T>; pack += blockDim.x) {
    Pack<T> held = load(values, pack);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const int64_t column = pack * kPack<T> + k;
      const float share = expf(to_float(held.values[k]) - top) * inverse;
      const float difference = column == label ? share - 1.0f : share;
      held.values[k] = from_float<T>(column < num_valid_tokens ? factor * difference : 0.0f);
    }
    store(values, pack, held);
  }
}

template <typename T>
int softmax_statistics(const void* logits, const int64_t* labels, float* highest, float* sum,
                       float* target, int64_t num_rows, int64_t num_columns,
                       int64_t num_valid_tokens, void* stream) {
  if (!is_whole_packs<T>(num_columns) || num_valid_tokens < 0 || num_valid_tokens > num_columns ||
      !are_aligned(logits)) {
    return kInvalidValue;
  }
  return launch(softmax_statistics_kernel<T>, num_rows,
                block_size(num_columns / kPack<T>, kSoftmaxThreads), stream,
                static_cast<const T*>(logits), labels, highest, sum, target, num_columns,
                num_valid_tokens);
}

template <typename T>
int softmax_gradient(void* logits, const int64_t* labels, const float* highest, const float* sum,
                     const float* scale, int64_t num_rows, int64_t num_columns,
                     int64_t num_valid_tokens, void* stream) {
  if (!is_whole_packs<T>(num_columns) || num_valid_tokens < 0 || num_valid_tokens > num_columns ||
      !are_aligned(logits)) {
    return kInvalidValue;
  }
  return launch(
      softmax_gradient_kernel<T>, num_rows, block_size(num_columns / kPack<T>, kSoftmaxThreads),
      stream, static_cast<T*>(logits), labels, highest, sum, scale, num_columns, num_valid_tokens);
}

}  // namespace chatflow

#define CHATFLOW_DEFINE_CROSS_ENTROPY(SUFFIX, T)                                            \
  int chatflow_softmax_statistics_##SUFFIX(                                                 \
      const void* logits, const int64_t* labels, float* highest, float* sum, float* target, \
      int64_t num_rows, int64_t num_columns, int64_t num_valid_tokens, void* stream) {      \
    return chatflow::softmax_statistics<T>(logits, labels, highest, sum, target, num_rows,  \
                                           num_columns, num_valid_tokens, stream);          \
  }                                                                                         \
  int chatflow_softmax_gradient_##SUFFIX(                                                   \
      void* logits, const int64_t* labels, const float* highest, const float* sum,          \
      const float* scale, int64_t num_rows, int64_t num_columns, int64_t num_valid_tokens,  \
      void* stream) {                                                                       \
    return chatflow::softmax_gradient<T>(logits, labels, highest, sum, scale, num_rows,     \
                                         num_columns, num_valid_tokens, stream);            \
  }

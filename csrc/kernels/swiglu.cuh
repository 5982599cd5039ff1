/**
 * @file swiglu.cuh
 * @brief SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020); see kernels.h.
 *
 * A block owns a row. The gradient needs x alone, so nothing but the input is kept for it.
 */
#pragma once

#include "device.cuh"

namespace chatflow {

constexpr int kSwigluThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_forward_kernel(const T* x, T* y, int64_t width) {
  const int64_t row = blockIdx.x;
  const T* gates = x + row * 2 * width;
  for (int64_t pack = threadIdx.x; pack < width / kPack<T>; pack += blockDim.x) {
    Pack<T> gate = load(gates, pack);
    const Pack<T> up = load(gates + width, pack);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const float g = to_float(gate.values[k]);
      gate.values[k] = from_float<T>(g / (1.0f + expf(-g)) * to_float(up.values[k]));
    }
    store(y + row * width, pack, gate);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_backward_kernel(const T* grad_y, const T* x, T* grad_x, int64_t width) {
  const int64_t row = blockIdx.x;
  const T* gates = x + row * 2 * width;
  T* out = grad_x + row * 2 * width;
  for (int64_t pack = threadIdx.x; pack < width / kPack<T>; pack += blockDim.x) {
    const Pack<T> gradient = load(grad_y + row * width, pack);
    Pack<T> gate = load(gates, pack);
    Pack<T> up = load(gates + width, pack);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const float g = to_float(gate.values[k]);
      const float u = to_float(up.values[k]);
      const float d = to_float(gradient.values[k]);
      const float sigmoid = 1.0f / (1.0f + expf(-g));
      gate.values[k] = from_float<T>(d * u * sigmoid * (1.0f + g * (1.0f - sigmoid)));
      up.values[k] = from_float<T>(d * g * sigmoid);
    }
    store(out, pack, gate);
    store(out + width, pack, up);
  }
}

template <typename T>
int swiglu_forward(const void* x, void* y, int64_t num_rows, int64_t width, void* stream) {
  if (!is_whole_packs<T>(width) || !are_aligned(x, y)) {
    return kInvalidValue;
  }
  return launch(swiglu_forward_kernel<T>, num_rows, block_size(width / kPack<T>, kSwigluThreads),
                stream, static_cast<const T*>(x), static_cast<T*>(y), width);
}

template <typename T>
int swiglu_backward(const void* grad_y, const void* x, void* grad_x, int64_t num_rows,
                    int64_t width, void* stream) {
  if (!is_whole_packs<T>(width) || !are_aligned(grad_y, x, grad_x)) {
    return kInvalidValue;
  }
  return launch(swiglu_backward_kernel<T>, num_rows, block_size(width / kPack<T>, kSwigluThreads),
                stream, static_cast<const T*>(grad_y), static_cast<const T*>(x),
                static_cast<T*>(grad_x), width);
}

}  // namespace chatflow

#define CHATFLOW_DEFINE_SWIGLU(SUFFIX, T)                                                       \
  int chatflow_swiglu_forward_##SUFFIX(const void* x, void* y, int64_t num_rows, int64_t width, \
                                       void* stream) {                                          \
    return chatflow::swiglu_forward<T>(x, y, num_rows, width, stream);                          \
  }                                                                                             \
  int chatflow_swiglu_backward_##SUFFIX(const void* grad_y, const void* x, void* grad_x,        \
                                        int64_t num_rows, int64_t width, void* stream) {        \
    return chatflow::swiglu_backward<T>(grad_y, x, grad_x, num_rows, width, stream);            \
  }

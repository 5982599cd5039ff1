/**
 * @file rope.cuh
 * @brief Rotary position embedding; see kernels.h for what is computed.
 *
 * A block owns a token: its heads share the angles, which stay in the cache next to it.
 */
#pragma once

#include "device.cuh"

namespace chatflow {

constexpr int kRopeThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kRopeThreads)
    rope_kernel(const T* x, const T* cosines, const T* sines, T* y, int num_heads, int64_t head_dim,
                int64_t token_stride, int64_t head_stride, float direction) {
  const int64_t token = blockIdx.x;
  const int64_t half = head_dim / 2;
  const int num_packs = static_cast<int>(half / kPack<T>);
  for (int i = threadIdx.x; i < num_heads * num_packs; i += blockDim.x) {
    const int head = i / num_packs;
    const int pack = i % num_packs;
    const T* in = x + token * token_stride + head * head_stride;
    T* out = y + (token * num_heads + head) * head_dim;
    const Pack<T> cosine = load(cosines + token * half, pack);
    const Pack<T> sine = load(sines + token * half, pack);
    Pack<T> real = load(in, pack);
    Pack<T> imaginary = load(in + half, pack);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const float re = to_float(real.values[k]);
      const float im = to_float(imaginary.values[k]);
      const float c = to_float(cosine.values[k]);
      const float s = to_float(sine.values[k]) * direction;
      real.values[k] = from_float<T>(re * c - im * s);
      imaginary.values[k] = from_float<T>(im * c + re * s);
    }
    store(out, pack, real);
    store(out + half, pack, imaginary);
  }
}

template <typename T>
int rope(const void* x, const void* cosines, const void* sines, void* y, int64_t num_tokens,
         int64_t num_heads, int64_t head_dim, int64_t token_stride, int64_t head_stride,
         float direction, void* stream) {
  const bool are_whole = head_dim % 2 == 0 && is_whole_packs<T>(head_dim / 2) &&
                         token_stride % kPack<T> == 0 && head_stride % kPack<T> == 0;
  if (!are_whole || num_heads < 1 || num_heads * head_dim > 0x7fffffff ||
      !are_aligned(x, cosines, sines, y)) {
    return kInvalidValue;
  }
  return launch(rope_kernel<T>, num_tokens,
                block_size(num_heads * head_dim / 2 / kPack<T>, kRopeThreads), stream,
                static_cast<const T*>(x), static_cast<const T*>(cosines),
                static_cast<const T*>(sines), static_cast<T*>(y), num_heads, head_dim, token_stride,
                head_stride, direction);
}

}  // namespace chatflow

#define CHATFLOW_DEFINE_ROPE(SUFFIX, T)                                                           \
  int chatflow_rope_##SUFFIX(const void* x, const void* cosines, const void* sines, void* y,      \
                             int64_t num_tokens, int64_t num_heads, int64_t head_dim,             \
                             int64_t token_stride, int64_t head_stride, float direction,          \
                             void* stream) {                                                      \
    return chatflow::rope<T>(x, cosines, sines, y, num_tokens, num_heads, head_dim, token_stride, \
                             head_stride, direction, stream);                                     \
  }

/**
 * @file device.cuh
 * @brief What the kernels share: bf16, packs of 16 bytes, sums over a block, the launch.
 *
 * Without nvcc the same sources compile for the host, where `emulation.h` runs a block's threads
 * one after another and hands over at every barrier. That is for tests: everything but speed.
 */
#pragma once

#include <cstdint>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
#include "emulation.h"
#endif

namespace chatflow {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

/** @brief A bfloat16 number: the upper half of an fp32 one. */
struct Bf16 {
  uint16_t bits;
};

__host__ __device__ inline float to_float(float value) { return value; }

__host__ __device__ inline float to_float(Bf16 value) {
  union {
    uint32_t bits;
    float number;
  } both = {static_cast<uint32_t>(value.bits) << 16};
  return both.number;
}

template <typename T>
__host__ __device__ T from_float(float value);

template <>
__host__ __device__ inline float from_float<float>(float value) {
  return value;
}

/** @brief Rounds to nearest, ties to even; NaN is 0x7fff. */
template <>
__host__ __device__ inline Bf16 from_float<Bf16>(float value) {
  Bf16 rounded;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
#else
  union {
    float number;
    uint32_t bits;
  } both = {value};
  const uint32_t odd = (both.bits >> 16) & 1;
  const bool is_nan = (both.bits & 0x7fffffffu) > 0x7f800000u;
  rounded.bits = is_nan ? 0x7fff : static_cast<uint16_t>((both.bits + 0x7fffu + odd) >> 16);
#endif
  return rounded;
}

/** @brief Elements of T that one load moves. */
template <typename T>
constexpr int kPack = 16 / sizeof(T);

/** @brief 16 bytes, moved at once. */
template <typename T>
struct alignas(16) Pack {
  T values[kPack<T>];
};

template <typename T>
__device__ inline Pack<T> load(const T* row, int64_t pack) {
  return reinterpret_cast<const Pack<T>*>(row)[pack];
}

template <typename T>
__device__ inline void store(T* row, int64_t pack, const Pack<T>& values) {
  reinterpret_cast<Pack<T>*>(row)[pack] = values;
}

template <typename T>
__device__ inline T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

__device__ inline float warp_max(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

/**
 * @brief Combines a value over the threads of a block of whole warps; every thread gets the result.
 *
 * @param value   This thread's.
 * @param scratch Shared by the block, kMaxWarps long; may be used again at once.
 * @param combine Over a warp.
 * @param neutral What absent warps count as.
 */
template <typename Combine>
__device__ inline float block_combine(float value, float* scratch, Combine combine, float neutral) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int num_warps = blockDim.x / kWarp;
  value = combine(value);
  __syncthreads();  // The scratch may still be read from the time before.
  if (lane == 0) {
    scratch[warp] = value;
  }
  __syncthreads();
  return combine(lane < num_warps ? scratch[lane] : neutral);
}

__device__ inline float block_sum(float value, float* scratch) {
  return block_combine(value, scratch, [](float v) { return warp_sum(v); }, 0.0f);
}

__device__ inline float block_max(float value, float* scratch) {
  return block_combine(value, scratch, [](float v) { return warp_max(v); }, -INFINITY);
}

/** @brief Threads for `work` items a block, whole warps, `most` at most. */
inline int block_size(int64_t work, int most) {
  const int64_t warps = (work + kWarp - 1) / kWarp;
  return static_cast<int>(warps * kWarp < most ? warps * kWarp : most);
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename... Pointers>
inline bool are_aligned(Pointers... pointers) {
  return (is_aligned(pointers) && ...);
}

/** @brief Whether `size` elements of T are whole packs, and there are any. */
template <typename T>
inline bool is_whole_packs(int64_t size) {
  return size > 0 && size % kPack<T> == 0;
}

/** @brief Queues a kernel; returns a `cudaError_t`. */
template <typename... Parameters, typename... Arguments>
inline int launch(void (*kernel)(Parameters...), int64_t num_blocks, int num_threads, void* stream,
                  Arguments... arguments) {
  if (num_blocks < 1 || num_blocks > 0x7fffffff) {
    return kInvalidValue;
  }
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(num_blocks), num_threads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
#else
  (void)stream;
  return emulation::run_grid(static_cast<unsigned>(num_blocks), num_threads,
                             [=] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

}  // namespace chatflow

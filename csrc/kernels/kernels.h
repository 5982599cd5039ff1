/**
 * @file kernels.h
 * @brief Launchers of the fused CUDA kernels: plain functions on pointers and a stream.
 *
 * Every launcher
 * - takes device pointers to row-major arrays, aligned to 16 bytes, and sizes in elements;
 * - comes as `chatflow_<name>_bf16` and `chatflow_<name>_fp32`, which is the type `T` below;
 *   everything else that is an array of numbers is fp32 and computed in fp32, rounded once;
 * - only queues work on `stream` (a `cudaStream_t`) of the current device, and never waits;
 * - returns 0, or a `cudaError_t`: 1 (`cudaErrorInvalidValue`) where a size or an alignment is not
 *   what it says here, in which case nothing was queued;
 * - sums in an order that depends on sizes alone, so the same input gives the same bits.
 *
 * "Packs" are 16 bytes: 8 elements of bf16, 4 of fp32. Row lengths have to be whole packs.
 */
#pragma once

#include <cstdint>

#define CHATFLOW_API extern "C" __attribute__((visibility("default")))

#define CHATFLOW_DECLARE(NAME, ...)          \
  CHATFLOW_API int NAME##_bf16(__VA_ARGS__); \
  CHATFLOW_API int NAME##_fp32(__VA_ARGS__);

/** @brief The longest row that the RMSNorm launchers take, in packs. */
constexpr int64_t kMaxNormPacks = 2048;

/**
 * @brief y = s * r * weight with r = (mean(s^2) + epsilon)^-1/2 and s = x + residual, by row.
 *
 * @param x         T[num_rows, hidden].
 * @param residual  T[num_rows, hidden], or null: s is x then, and `sum` is not written.
 * @param weight    T[hidden].
 * @param y         T[num_rows, hidden], out.
 * @param sum       T[num_rows, hidden], out: s, rounded; the norm is taken of the rounded sum.
 * @param rstd      fp32[num_rows], out: r.
 * @param num_rows  At least 1.
 * @param hidden    Whole packs, at most kMaxNormPacks of them.
 * @param epsilon   Added to the mean square.
 * @param stream    Where it is queued.
 */
CHATFLOW_DECLARE(chatflow_rms_norm_forward, const void* x, const void* residual, const void* weight,
                 void* y, void* sum, float* rstd, int64_t num_rows, int64_t hidden, float epsilon,
                 void* stream)

/**
 * @brief Gradients of the norm by its input s and by the weight.
 *
 * grad_s = r * (g - s * r * mean(g * s * r)) + grad_sum with g = grad_y * weight;
 * grad_weight = sum over rows of grad_y * s * r, in two steps without atomics.
 *
 * @param grad_y       T[num_rows, hidden].
 * @param grad_sum     T[num_rows, hidden], or null: the gradient that reached s past the norm.
 * @param s            T[num_rows, hidden]: what was normalised.
 * @param weight       T[hidden].
 * @param rstd         fp32[num_rows], of the forward pass.
 * @param grad_s       T[num_rows, hidden], out.
 * @param partials     fp32[num_partials, hidden], scratch.
 * @param grad_weight  T[hidden], out.
 * @param num_partials Thread blocks, at least 1: some for each multiprocessor.
 */
CHATFLOW_DECLARE(chatflow_rms_norm_backward, const void* grad_y, const void* grad_sum,
                 const void* s, const void* weight, const float* rstd, void* grad_s,
                 float* partials, void* grad_weight, int64_t num_rows, int64_t hidden,
                 int64_t num_partials, void* stream)

/**
 * @brief Turns the pairs (x[i], x[i + head_dim/2]) of every head by its token's angles.
 *
 * @param x            T, head h of token t begins at t * token_stride + h * head_stride.
 * @param cosines      T[num_tokens, head_dim / 2].
 * @param sines        T[num_tokens, head_dim / 2].
 * @param y            T[num_tokens, num_heads, head_dim], out.
 * @param num_tokens   At least 1.
 * @param num_heads    At least 1.
 * @param head_dim     Twice a number of whole packs.
 * @param token_stride Whole packs.
 * @param head_stride  Whole packs.
 * @param direction    1 turns by the angles; -1 turns back, which is the gradient.
 */
CHATFLOW_DECLARE(chatflow_rope, const void* x, const void* cosines, const void* sines, void* y,
                 int64_t num_tokens, int64_t num_heads, int64_t head_dim, int64_t token_stride,
                 int64_t head_stride, float direction, void* stream)

/**
 * @brief y = silu(gate) * up, where a row of x is its gate followed by its up part.
 *
 * @param x        T[num_rows, 2 * width].
 * @param y        T[num_rows, width], out.
 * @param num_rows At least 1.
 * @param width    Whole packs.
 */
CHATFLOW_DECLARE(chatflow_swiglu_forward, const void* x, void* y, int64_t num_rows, int64_t width,
                 void* stream)

/**
 * @brief Gradient of `chatflow_swiglu_forward` by x.
 *
 * @param grad_y T[num_rows, width].
 * @param x      T[num_rows, 2 * width].
 * @param grad_x T[num_rows, 2 * width], out; may be x.
 */
CHATFLOW_DECLARE(chatflow_swiglu_backward, const void* grad_y, const void* x, void* grad_x,
                 int64_t num_rows, int64_t width, void* stream)

/**
 * @brief What a row of logits contributes to a softmax over a vocabulary cut into slices.
 *
 * @param logits     T[num_rows, num_columns]: this slice's.
 * @param labels     int64[num_rows], counted from the slice's first column; the label lies in
 *                   another slice if it is not in [0, num_valid_tokens).
 * @param highest    fp32[num_rows], out: the highest logit; -1e30 where num_valid_tokens is 0.
 * @param sum        fp32[num_rows], out: sum of exp(logit - highest).
 * @param target     fp32[num_rows], out: the label's logit; 0 if it lies in another slice.
 * @param num_rows   At least 1.
 * @param num_columns Whole packs.
 * @param num_valid_tokens Columns that take part; those behind are padding.
 */
CHATFLOW_DECLARE(chatflow_softmax_statistics, const void* logits, const int64_t* labels,
                 float* highest, float* sum, float* target, int64_t num_rows, int64_t num_columns,
                 int64_t num_valid_tokens, void* stream)

/**
 * @brief Overwrites logits by scale * (softmax - onehot(label)), 0 in the padding.
 *
 * @param logits  T[num_rows, num_columns], in and out.
 * @param labels  As above.
 * @param highest fp32[num_rows]: of the whole vocabulary's logits.
 * @param sum     fp32[num_rows]: over the whole vocabulary, of exp(logit - highest).
 * @param scale   fp32[num_rows].
 */
CHATFLOW_DECLARE(chatflow_softmax_gradient, void* logits, const int64_t* labels,
                 const float* highest, const float* sum, const float* scale, int64_t num_rows,
                 int64_t num_columns, int64_t num_valid_tokens, void* stream)

/**
 * @file kernels.h
 * @brief Launchers of the CUDA kernels of the loss: plain functions on pointers and a stream.
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
 * @param stream     Where it is queued.
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

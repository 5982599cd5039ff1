/// \file
/// CPU kernels for bf16 training: argument structures, and one table of serial row loops per
/// instruction set.
///
/// Rows are contiguous bf16 values stored as `uint16_t`; statistics are fp32. All kernels compute
/// in fp32 with sixteen lanes on every machine and round each result to bf16 once (nearest even).
/// They do not allocate, and a row's result does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace chatflow::cpu {

using bf16 = std::uint16_t;

/// Maximum row length of `CausalSoftmax`, whose fp32 row is a stack buffer.
constexpr std::int64_t kMaxKeys = 4096;

/// Maximum number of inputs of `Reduce`, which is the size of a stack buffer.
constexpr int kMaxInputs = 64;

/// Replaces logits by `exp(logit - row maximum)`.
struct Exponentiate {
  bf16* logits;    ///< [rows, row_size], overwritten
  float* highest;  ///< [rows], maximum logit; finite even if a row has no valid token
  float* sums;     ///< [rows], sums of the exponentials before they are rounded
  std::int64_t row_size;
  std::int64_t num_valid_tokens;  ///< logits at and beyond this index become 0
};

/// RMSNorm of each row, `x * rsqrt(mean(x^2) + epsilon) * weight`.
struct RmsNorm {
  const bf16* input;   ///< [rows, row_size]
  const bf16* weight;  ///< [row_size]
  bf16* output;        ///< [rows, row_size]
  float* scales;       ///< [rows], `rsqrt(mean(x^2) + epsilon)`, saved for the backward pass
  std::int64_t row_size;
  float epsilon;
};

/// Gradients of `RmsNorm`.
struct RmsNormBackward {
  const bf16* gradient;  ///< [rows, row_size], of the output
  const bf16* input;     ///< [rows, row_size]
  const bf16* weight;    ///< [row_size]
  const float* scales;   ///< [rows]
  bf16* grad_input;      ///< [rows, row_size]
  float* grad_weight;    ///< [row_size], accumulated
  std::int64_t row_size;
};

/// `silu(gate) * linear` of rows `[gate | linear]`.
struct SwiGlu {
  const bf16* input;  ///< [rows, 2 * row_size]
  bf16* output;       ///< [rows, row_size]
  std::int64_t row_size;
};

/// Gradient of `SwiGlu`.
struct SwiGluBackward {
  const bf16* gradient;  ///< [rows, row_size]
  const bf16* input;     ///< [rows, 2 * row_size]
  bf16* grad_input;      ///< [rows, 2 * row_size]
  std::int64_t row_size;
};

/// Applies rotary embeddings and optionally changes the memory layout; one row is one token.
struct Rotate {
  const bf16* input;  ///< token t, head h at `t * input_token + h * input_head`
  bf16* output;  ///< token t, head h at `document(t) * output_document + t' * output_token + ...`
  const float* cosines;  ///< [tokens, head_dim / 2]; null copies without rotation
  const float* sines;    ///< [tokens, head_dim / 2]
  float direction;       ///< 1 forward, -1 backward
  std::int64_t num_heads, head_dim;
  std::int64_t document_length;  ///< token t is token `t % document_length` of its document
  std::int64_t input_document, input_token, input_head;  ///< strides, in elements
  std::int64_t output_document, output_token, output_head;
};

/// Causal softmax; a row holds the scores of one query of one head, at most `kMaxKeys`.
struct CausalSoftmax {
  bf16* scores;  ///< [rows, num_keys], overwritten by probabilities
  std::int64_t num_keys;
  std::int64_t num_queries;  ///< row r is query `r % num_queries` of its head
  std::int64_t first_query;  ///< query q sees keys 0 to `first_query + q`
  float scale;               ///< factor on the scores
};

/// Gradient of `CausalSoftmax` with respect to the scores.
struct CausalSoftmaxBackward {
  const bf16* probabilities;  ///< [rows, num_keys]
  bf16* gradient;             ///< [rows, num_keys], of the probabilities; overwritten
  std::int64_t num_keys, num_queries, first_query;
  float scale;
};

enum class Element { kBf16, kFp32 };
enum class Reduction { kSum, kMax };

/// Element-wise sum or maximum of several tensors in the order given, rounded once.
struct Reduce {
  const void* const* inputs;  ///< `num_inputs` pointers; the output may be one of them
  int num_inputs;             ///< from 1 to `kMaxInputs`
  void* output;
  Element element;  ///< dtype of inputs and output
  Reduction reduction;
};

/// The loops of one instruction set. Each processes rows [begin, end); `reduce` elements.
struct Kernels {
  const char* name;
  void (*exponentiate)(const Exponentiate&, std::int64_t begin, std::int64_t end);
  void (*rms_norm)(const RmsNorm&, std::int64_t begin, std::int64_t end);
  void (*rms_norm_backward)(const RmsNormBackward&, std::int64_t begin, std::int64_t end);
  void (*swiglu)(const SwiGlu&, std::int64_t begin, std::int64_t end);
  void (*swiglu_backward)(const SwiGluBackward&, std::int64_t begin, std::int64_t end);
  void (*rotate)(const Rotate&, std::int64_t begin, std::int64_t end);
  void (*causal_softmax)(const CausalSoftmax&, std::int64_t begin, std::int64_t end);
  void (*causal_softmax_backward)(const CausalSoftmaxBackward&, std::int64_t begin,
                                  std::int64_t end);
  void (*reduce)(const Reduce&, std::int64_t begin, std::int64_t end);
};

const Kernels& avx512_bf16_kernels();
const Kernels& avx512_kernels();
const Kernels& avx2_kernels();
const Kernels& portable_kernels();

/// Tables that this processor supports, widest vectors first.
std::vector<const Kernels*> runnable_kernels();

/// The table in use: the widest unless `use_kernels` selected another.
const Kernels& kernels();

/// Selects a table by name, for tests.
/// \throws std::invalid_argument this processor supports no table of that name
void use_kernels(const std::string& name);

}  // namespace chatflow::cpu

/// \file
/// CPU kernels for bf16 training: the serial loops over rows that each instruction set compiles for
/// itself, and the table through which the chosen one is called.
///
/// In: pointers to contiguous rows of bf16, held as `uint16_t`, and fp32 statistics. Out: rows
/// written in place or beside. Arithmetic is fp32 in sixteen lanes whatever the machine; each
/// result is rounded to bf16 once, to nearest even. No call allocates, and none looks at the number
/// of threads, so that a row's result depends on the row alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace chatflow::cpu {

using bf16 = std::uint16_t;

/// The longest row of `CausalSoftmax`: its weights lie on the stack.
constexpr std::int64_t kMaxKeys = 4096;

/// Most tensors that `Reduce` takes; so many lie on the stack.
constexpr int kMaxInputs = 64;

/// Turns logits into `exp(logit - row's highest)`.
struct Exponentiate {
  bf16* logits;    ///< [rows, row_size], overwritten
  float* highest;  ///< [rows], each row's highest logit; finite even if a row has no valid token
  float* sums;     ///< [rows], sums of the exponentials before they are rounded
  std::int64_t row_size;
  std::int64_t num_valid_tokens;  ///< entries from here on become 0
};

/// RMSNorm of each row, `x * rsqrt(mean(x^2) + epsilon) * weight`.
struct RmsNorm {
  const bf16* input;   ///< [rows, row_size]
  const bf16* weight;  ///< [row_size]
  bf16* output;        ///< [rows, row_size]
  float* scales;       ///< [rows], the reciprocal roots, for the backward pass
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
  float* grad_weight;    ///< [row_size], added to
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

/// Rotates heads by the angles of their tokens and may lay them out anew; one row is one token.
struct Rotate {
  const bf16* input;  ///< token t, head h at `t * input_token + h * input_head`
  bf16* output;  ///< token t, head h at `document(t) * output_document + t' * output_token + ...`
  const float* cosines;  ///< [tokens, head_dim / 2]; null: nothing is rotated, only moved
  const float* sines;    ///< [tokens, head_dim / 2]
  float direction;       ///< 1 forward, -1 backward
  std::int64_t num_heads, head_dim;
  std::int64_t document_length;  ///< token t is token `t % document_length` of its document
  std::int64_t input_document, input_token, input_head;  ///< strides, in elements
  std::int64_t output_document, output_token, output_head;
};

/// Softmax of scores under a causal mask; a row is one query of one head, of at most `kMaxKeys`.
struct CausalSoftmax {
  bf16* scores;  ///< [rows, num_keys], overwritten by probabilities
  std::int64_t num_keys;
  std::int64_t num_queries;  ///< row r is query `r % num_queries` of its head
  std::int64_t first_query;  ///< query q sees keys 0 to `first_query + q`
  float scale;               ///< factor on the scores
};

/// Gradient of `CausalSoftmax` by its scores.
struct CausalSoftmaxBackward {
  const bf16* probabilities;  ///< [rows, num_keys]
  bf16* gradient;             ///< [rows, num_keys], of the probabilities; overwritten
  std::int64_t num_keys, num_queries, first_query;
  float scale;
};

enum class Element { kBf16, kFp32 };
enum class Reduction { kSum, kMax };

/// Element by element, the sum or the highest of several tensors, in their order; rounded once.
struct Reduce {
  const void* const* inputs;  ///< `num_inputs` pointers; the output may be one of them
  int num_inputs;             ///< from 1 to `kMaxInputs`
  void* output;
  Element element;  ///< of inputs and output
  Reduction reduction;
};

/// The loops of one instruction set; each works on rows `begin` to `end`, `reduce` on elements.
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

/// The tables that this processor can run, the widest first.
std::vector<const Kernels*> runnable_kernels();

/// The table in use: the widest, unless `use_kernels` has chosen another.
const Kernels& kernels();

/// Chooses a table by its name, for tests.
/// \throws std::invalid_argument this processor runs none of that name.
void use_kernels(const std::string& name);

}  // namespace chatflow::cpu

/// \file
/// Serial loops of `kernels.h` over a range of rows.
///
/// The file of each instruction set includes this once, inside its namespace, after `lanes.h`.

/// Calls `whole(i)` for each full vector and `rest(i, count)` for the remaining elements.
template <typename Whole, typename Rest>
CHATFLOW_INLINE void for_lanes(std::int64_t size, Whole whole, Rest rest) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) whole(i);
  if (i < size) rest(i, size - i);
}

constexpr bf16 kLowest = 0xff7f;  // the lowest finite bf16

CHATFLOW_INLINE float row_highest(const bf16* row, std::int64_t size) {
  Floats top = splat(-3.3895314e38f);
  for_lanes(
      size,
      [&](std::int64_t i) __attribute__((always_inline)) { top = larger(load(row + i), top); },
      [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        top = larger(load_some(row + i, count, kLowest), top);
      });
  return highest_lane(top);
}

/// Overwrites a row with `exp(x - shift)` and returns the sum of the unrounded values.
CHATFLOW_INLINE float exponentiate_row(bf16* row, std::int64_t size, float shift) {
  Floats total{};
  for_lanes(
      size,
      [&](std::int64_t i) __attribute__((always_inline)) {
        Floats e = exponential(load(row + i) - shift);
        total += e;
        store(row + i, e);
      },
      [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        float padded[kLanes];
        store(padded, exponential(load_some(row + i, count, kLowest) - shift));
        Floats e = load_some(padded, count, 0.0f);
        total += e;
        store_some(row + i, e, count);
      });
  return sum(total);
}

static void exponentiate(const Exponentiate& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    bf16* row = a.logits + r * a.row_size;
    float top = a.num_valid_tokens > 0 ? row_highest(row, a.num_valid_tokens) : -1e30f;
    a.highest[r] = top;
    a.sums[r] = exponentiate_row(row, a.num_valid_tokens, top);
    std::memset(row + a.num_valid_tokens, 0, (a.row_size - a.num_valid_tokens) * sizeof(bf16));
  }
}

static void rms_norm(const RmsNorm& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.row_size;
  for (std::int64_t r = begin; r < end; ++r) {
    const bf16* x = a.input + r * n;
    Floats squares{};
    for_lanes(
        n,
        [&](std::int64_t i) __attribute__((always_inline)) {
          Floats v = load(x + i);
          squares += v * v;
        },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          Floats v = load_some(x + i, count, bf16(0));
          squares += v * v;
        });
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + a.epsilon);
    a.scales[r] = scale;
    bf16* y = a.output + r * n;
    for_lanes(
        n,
        [&](std::int64_t i) __attribute__((always_inline)) {
          store(y + i, load(x + i) * scale * load(a.weight + i));
        },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          Floats w = load_some(a.weight + i, count, bf16(0));
          store_some(y + i, load_some(x + i, count, bf16(0)) * scale * w, count);
        });
  }
}

static void rms_norm_backward(const RmsNormBackward& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.row_size;
  for (std::int64_t r = begin; r < end; ++r) {
    const bf16 *x = a.input + r * n, *g = a.gradient + r * n;
    const float scale = a.scales[r];
    Floats products{};
    for_lanes(
        n,
        [&](std::int64_t i) __attribute__((always_inline)) {
          products += load(g + i) * load(a.weight + i) * load(x + i);
        },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          products += load_some(g + i, count, bf16(0)) * load_some(a.weight + i, count, bf16(0)) *
                      load_some(x + i, count, bf16(0));
        });
    // d/dx of x s w with s = (mean(x^2) + eps)^(-1/2):  s g w - x s^3 mean(g w x)
    const float back = scale * scale * scale * sum(products) / static_cast<float>(n);
    bf16* dx = a.grad_input + r * n;
    for_lanes(
        n,
        [&](std::int64_t i) __attribute__((always_inline)) {
          Floats v = load(x + i), d = load(g + i) * scale;
          store(dx + i, d * load(a.weight + i) - v * back);
          store(a.grad_weight + i, load(a.grad_weight + i) + d * v);
        },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          Floats v = load_some(x + i, count, bf16(0));
          Floats d = load_some(g + i, count, bf16(0)) * scale;
          store_some(dx + i, d * load_some(a.weight + i, count, bf16(0)) - v * back, count);
          Floats sums = load_some(a.grad_weight + i, count, 0.0f) + d * v;
          store_some(a.grad_weight + i, sums, count);
        });
  }
}

CHATFLOW_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

static void swiglu(const SwiGlu& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.row_size;
  for (std::int64_t r = begin; r < end; ++r) {
    const bf16 *gate = a.input + r * 2 * n, *linear = gate + n;
    bf16* y = a.output + r * n;
    for_lanes(
        n,
        [&](std::int64_t i) __attribute__((always_inline)) {
          Floats v = load(gate + i);
          store(y + i, v * sigmoid(v) * load(linear + i));
        },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          Floats v = load_some(gate + i, count, bf16(0));
          store_some(y + i, v * sigmoid(v) * load_some(linear + i, count, bf16(0)), count);
        });
  }
}

static void swiglu_backward(const SwiGluBackward& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.row_size;
  for (std::int64_t r = begin; r < end; ++r) {
    const bf16 *gate = a.input + r * 2 * n, *linear = gate + n, *g = a.gradient + r * n;
    bf16 *grad_gate = a.grad_input + r * 2 * n, *grad_linear = grad_gate + n;
    for_lanes(
        n,
        [&](std::int64_t i) __attribute__((always_inline)) {
          Floats v = load(gate + i), d = load(g + i), s = sigmoid(v), silu = v * s;
          store(grad_linear + i, d * silu);
          store(grad_gate + i, d * load(linear + i) * (s + silu * (1.0f - s)));
        },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          Floats v = load_some(gate + i, count, bf16(0)), d = load_some(g + i, count, bf16(0));
          Floats s = sigmoid(v), silu = v * s, u = load_some(linear + i, count, bf16(0));
          store_some(grad_linear + i, d * silu, count);
          store_some(grad_gate + i, d * u * (s + silu * (1.0f - s)), count);
        });
  }
}

/// Rotates both halves of one head; `size` is half of the head dimension.
CHATFLOW_INLINE void rotate_head(const bf16* from, bf16* to, const float* cosines,
                                 const float* sines, float direction, std::int64_t size) {
  for_lanes(
      size,
      [&](std::int64_t i) __attribute__((always_inline)) {
        Floats re = load(from + i), im = load(from + size + i);
        Floats c = load(cosines + i), s = load(sines + i) * direction;
        store(to + i, re * c - im * s);
        store(to + size + i, im * c + re * s);
      },
      [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        Floats re = load_some(from + i, count, bf16(0));
        Floats im = load_some(from + size + i, count, bf16(0));
        Floats c = load_some(cosines + i, count, 0.0f);
        Floats s = load_some(sines + i, count, 0.0f) * direction;
        store_some(to + i, re * c - im * s, count);
        store_some(to + size + i, im * c + re * s, count);
      });
}

static void rotate(const Rotate& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t half = a.head_dim / 2;
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t document = t / a.document_length, position = t % a.document_length;
    const bf16* from = a.input + document * a.input_document + position * a.input_token;
    bf16* to = a.output + document * a.output_document + position * a.output_token;
    for (std::int64_t h = 0; h < a.num_heads; ++h, from += a.input_head, to += a.output_head) {
      if (a.cosines == nullptr) {
        std::memcpy(to, from, a.head_dim * sizeof(bf16));
      } else {
        rotate_head(from, to, a.cosines + t * half, a.sines + t * half, a.direction, half);
      }
    }
  }
}

static void causal_softmax(const CausalSoftmax& a, std::int64_t begin, std::int64_t end) {
  float weights[kMaxKeys];  // fp32 until the sum is known, so that values are rounded once
  for (std::int64_t r = begin; r < end; ++r) {
    bf16* row = a.scores + r * a.num_keys;
    const std::int64_t seen = a.first_query + r % a.num_queries + 1;
    const float top = row_highest(row, seen) * a.scale;
    Floats total{};
    for_lanes(
        seen,
        [&](std::int64_t i) __attribute__((always_inline)) {
          Floats e = exponential(load(row + i) * a.scale - top);
          total += e;
          store(weights + i, e);
        },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          Floats e = exponential(load_some(row + i, count, kLowest) * a.scale - top);
          store_some(weights + i, e, count);
          total += load_some(weights + i, count, 0.0f);
        });
    const float share = 1.0f / sum(total);
    for_lanes(
        seen,
        [&](std::int64_t i)
            __attribute__((always_inline)) { store(row + i, load(weights + i) * share); },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          store_some(row + i, load_some(weights + i, count, 0.0f) * share, count);
        });
    std::memset(row + seen, 0, (a.num_keys - seen) * sizeof(bf16));
  }
}

static void causal_softmax_backward(const CausalSoftmaxBackward& a, std::int64_t begin,
                                    std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const bf16* p = a.probabilities + r * a.num_keys;
    bf16* d = a.gradient + r * a.num_keys;
    const std::int64_t seen = a.first_query + r % a.num_queries + 1;
    Floats products{};
    for_lanes(
        seen,
        [&](std::int64_t i)
            __attribute__((always_inline)) { products += load(p + i) * load(d + i); },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          products += load_some(p + i, count, bf16(0)) * load_some(d + i, count, bf16(0));
        });
    const float mean = sum(products);
    for_lanes(
        seen,
        [&](std::int64_t i) __attribute__((always_inline)) {
          store(d + i, load(p + i) * (load(d + i) - mean) * a.scale);
        },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          Floats g = load_some(d + i, count, bf16(0)) - mean;
          store_some(d + i, load_some(p + i, count, bf16(0)) * g * a.scale, count);
        });
    std::memset(d + seen, 0, (a.num_keys - seen) * sizeof(bf16));
  }
}

template <bool kIsSum, typename T>
CHATFLOW_INLINE void reduce_as(const Reduce& a, std::int64_t begin, std::int64_t end) {
  T* output = static_cast<T*>(a.output);
  auto from = [&](int k) { return static_cast<const T*>(a.inputs[k]); };
  auto join = [](Floats x, Floats y)
                  __attribute__((always_inline)) { return kIsSum ? x + y : larger(y, x); };
  for_lanes(
      end - begin,
      [&](std::int64_t i) __attribute__((always_inline)) {
        Floats all = load(from(0) + begin + i);
        for (int k = 1; k < a.num_inputs; ++k) all = join(all, load(from(k) + begin + i));
        store(output + begin + i, all);
      },
      [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        Floats all = load_some(from(0) + begin + i, count, T(0));
        for (int k = 1; k < a.num_inputs; ++k) {
          all = join(all, load_some(from(k) + begin + i, count, T(0)));
        }
        store_some(output + begin + i, all, count);
      });
}

static void reduce(const Reduce& a, std::int64_t begin, std::int64_t end) {
  const bool is_sum = a.reduction == Reduction::kSum;
  if (a.element == Element::kBf16) {
    is_sum ? reduce_as<true, bf16>(a, begin, end) : reduce_as<false, bf16>(a, begin, end);
  } else {
    is_sum ? reduce_as<true, float>(a, begin, end) : reduce_as<false, float>(a, begin, end);
  }
}

static const Kernels kTable = {
    CHATFLOW_ISA_NAME, exponentiate, rms_norm,       rms_norm_backward,       swiglu,
    swiglu_backward,   rotate,       causal_softmax, causal_softmax_backward, reduce};

/// \file
/// Vectors of sixteen fp32 lanes, and conversion from and to bf16 rows.
///
/// Uses the vector extension of GCC and Clang, which compiles for every target. Each file that
/// includes this one selects an instruction set and a namespace, and everything is inlined, so that
/// the linker cannot merge code of a wider instruction set into a portable function.
#define CHATFLOW_INLINE static inline __attribute__((always_inline))

constexpr std::int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));

CHATFLOW_INLINE Floats splat(float value) { return Floats{} + value; }

/// Sixteen bf16 values.
CHATFLOW_INLINE Floats load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

CHATFLOW_INLINE Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

CHATFLOW_INLINE void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

/// Rounds to nearest even and preserves NaN.
CHATFLOW_INLINE void store(bf16* to, Floats values) {
#ifdef CHATFLOW_ROUND
  Halves halves = CHATFLOW_ROUND(values);
#else
  Words words = (Words)values;
  Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  Words is_nan = (Words)(values != values);
  Words bits = (rounded & ~is_nan) | (((words >> 16) | 0x40u) & is_nan);
  Halves halves = __builtin_convertvector(bits, Halves);
#endif
  std::memcpy(to, &halves, sizeof(halves));
}

/// Loads `count` < 16 values and fills the remaining lanes with `other`.
template <typename T>
CHATFLOW_INLINE Floats load_some(const T* from, std::int64_t count, T other) {
  T padded[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) padded[i] = i < count ? from[i] : other;
  return load(padded);
}

template <typename T>
CHATFLOW_INLINE void store_some(T* to, Floats values, std::int64_t count) {
  T padded[kLanes];
  store(padded, values);
  std::memcpy(to, padded, count * sizeof(T));
}

CHATFLOW_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

/// Adds the lanes in a fixed order.
CHATFLOW_INLINE float sum(Floats values) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += values[i];
  return total;
}

CHATFLOW_INLINE float highest_lane(Floats values) {
  float top = values[0];
  for (int i = 1; i < kLanes; ++i) top = values[i] > top ? values[i] : top;
  return top;
}

/// `exp(x)` with a relative error of at most 1e-5 for x in [-87, 88]; x is clamped to that range.
/// The error is far below bf16's and does not bias sums.
///
/// Range reduction: x = n ln 2 + r with |r| <= ln(2) / 2; exp(r) is the minimax polynomial of
/// degree 5 on that interval.
CHATFLOW_INLINE Floats exponential(Floats x) {
  // This order of operands propagates NaN.
  const Floats low = splat(-87.0f), high = splat(88.0f);
  x = low > x ? low : x;
  x = high < x ? high : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits of the mantissa.
  const Floats magic = splat(12582912.0f);
  Floats shifted = x * 1.44269504f + magic;
  Floats r = x - (shifted - magic) * 0.693147181f;
  Floats p = splat(8.297583704e-03f);
  p = p * r + 4.191587662e-02f;
  p = p * r + 1.666757836e-01f;
  p = p * r + 4.999889047e-01f;
  p = p * r + 9.999996901e-01f;
  p = p * r + 1.000000072e+00f;
  return p * (Floats)(((Ints)shifted - (Ints)magic + 127) << 23);
}

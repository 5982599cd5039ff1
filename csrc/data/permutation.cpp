#include "permutation.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace chatflow {
namespace {

/// The least r with r * r >= value.
uint64_t ceil_sqrt(uint64_t value) {
  auto root = static_cast<uint64_t>(std::sqrt(static_cast<double>(value)));
  while (root > 0 && (root - 1) * (root - 1) >= value) --root;
  while (root * root < value) ++root;
  return root;
}

uint64_t mix(uint64_t value, uint64_t key) {
  uint64_t z = value * 0x9E3779B97F4A7C15u + key;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

uint64_t reduce(uint64_t z, uint64_t modulus) { return ((z >> 32) * modulus) >> 32; }

uint64_t add_modulo(uint64_t a, uint64_t b, uint64_t modulus) {
  const uint64_t sum = a + b;
  return sum >= modulus ? sum - modulus : sum;
}

}  // namespace

Permutation::Permutation(int64_t size, const std::array<uint64_t, kNumRounds>& keys) : keys_(keys) {
  if (size < 1 || size > kMaxPermutationSize) {
    throw std::invalid_argument("permutation: size " + std::to_string(size) +
                                " is not between 1 and 2^62");
  }
  size_ = static_cast<uint64_t>(size);
  rows_ = ceil_sqrt(size_);
  columns_ = (size_ + rows_ - 1) / rows_;
  columns_ += columns_ % 2;
}

uint64_t Permutation::encrypt(uint64_t value) const {
  uint64_t left = value / columns_;
  uint64_t right = value % columns_;
  for (int round = 0; round < kNumRounds; round += 2) {
    left = add_modulo(left, reduce(mix(right, keys_[round]), rows_), rows_);
    right = add_modulo(right, reduce(mix(left, keys_[round + 1]), columns_), columns_);
  }
  return left * columns_ + right;
}

int64_t Permutation::operator()(int64_t place) const {
  if (place < 0 || static_cast<uint64_t>(place) >= size_) {
    throw std::invalid_argument("permutation: place " + std::to_string(place) + " is not in [0, " +
                                std::to_string(size_) + ")");
  }
  auto value = static_cast<uint64_t>(place);
  do {
    value = encrypt(value);
  } while (value >= size_);
  return static_cast<int64_t>(value);
}

}  // namespace chatflow

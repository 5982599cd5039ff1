/// \file
/// A keyed permutation of 0..size-1 that needs no memory: a Feistel network on a near-square
/// rectangle with cycle walking. `megatron_chatflow/data/permutation.py` is the reference.
#pragma once

#include <array>
#include <cstdint>

namespace chatflow {

/// Number of rounds and of round keys.
inline constexpr int kNumRounds = 16;
/// Maximum size of the domain. Both halves are then below 2^32, as the reduction requires.
inline constexpr int64_t kMaxPermutationSize = int64_t{1} << 62;

/// A permutation. Cheap to construct and thread-safe.
class Permutation {
 public:
  /// \param size number of elements, 1 to 2^62
  /// \param keys round keys
  /// \throws std::invalid_argument the size is out of range
  Permutation(int64_t size, const std::array<uint64_t, kNumRounds>& keys);

  /// Returns the image of a position.
  /// \throws std::invalid_argument the position is not in [0, size)
  int64_t operator()(int64_t place) const;

 private:
  uint64_t encrypt(uint64_t value) const;

  uint64_t size_;
  uint64_t rows_;
  uint64_t columns_;
  std::array<uint64_t, kNumRounds> keys_;
};

}  // namespace chatflow

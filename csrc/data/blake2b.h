/// \file
/// BLAKE2b with a digest of 16 bytes and no key (RFC 7693), for the digests of samples.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace chatflow {

/// The initial state: the square roots of the first eight primes.
inline constexpr std::array<uint64_t, 8> kBlake2bInitial = {
    0x6A09E667F3BCC908u, 0xBB67AE8584CAA73Bu, 0x3C6EF372FE94F82Bu, 0xA54FF53A5F1D36F1u,
    0x510E527FADE682D1u, 0x9B05688C2B3E6C1Fu, 0x1F83D9ABFB41BD6Bu, 0x5BE0CD19137E2179u};

/// The order of a block's words in every round.
inline constexpr uint8_t kBlake2bSigma[12][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3}};

/// Hashes bytes that arrive in chunks.
class Blake2b128 {
 public:
  Blake2b128();

  /// Appends bytes.
  void update(const void* data, size_t num_bytes);

  /// Writes the digest's 16 bytes; nothing may be appended after it.
  void finish(uint8_t* digest);

 private:
  static constexpr size_t kBlockBytes = 128;

  void compress(const uint8_t* block, bool last);

  std::array<uint64_t, 8> state_;
  std::array<uint8_t, kBlockBytes> block_{};
  size_t num_buffered_ = 0;
  uint64_t num_bytes_ = 0;
};

}  // namespace chatflow

/// \file
/// BLAKE2b with a digest of 16 bytes and no key (RFC 7693), for the digests of samples.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace chatflow {

/// Hashes bytes that come in pieces.
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

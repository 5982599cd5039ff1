#include "blake2b.h"

#include <algorithm>
#include <cstring>

namespace chatflow {
namespace {

constexpr size_t kDigestBytes = 16;

constexpr std::array<uint64_t, 8> kInitial = {
    0x6A09E667F3BCC908u, 0xBB67AE8584CAA73Bu, 0x3C6EF372FE94F82Bu, 0xA54FF53A5F1D36F1u,
    0x510E527FADE682D1u, 0x9B05688C2B3E6C1Fu, 0x1F83D9ABFB41BD6Bu, 0x5BE0CD19137E2179u};

constexpr uint8_t kSigma[12][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
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

uint64_t rotate_right(uint64_t value, int count) { return value >> count | value << (64 - count); }

uint64_t load_little_endian(const uint8_t* bytes) {
  uint64_t value = 0;
  for (int k = 0; k < 8; ++k) value |= static_cast<uint64_t>(bytes[k]) << (8 * k);
  return value;
}

void quarter(uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d, uint64_t x, uint64_t y) {
  a += b + x;
  d = rotate_right(d ^ a, 32);
  c += d;
  b = rotate_right(b ^ c, 24);
  a += b + y;
  d = rotate_right(d ^ a, 16);
  c += d;
  b = rotate_right(b ^ c, 63);
}

}  // namespace

Blake2b128::Blake2b128() : state_(kInitial) { state_[0] ^= 0x01010000u ^ kDigestBytes; }

void Blake2b128::compress(const uint8_t* block, bool last) {
  uint64_t m[16];
  for (int k = 0; k < 16; ++k) m[k] = load_little_endian(block + 8 * k);
  uint64_t v[16];
  std::copy(state_.begin(), state_.end(), v);
  std::copy(kInitial.begin(), kInitial.end(), v + 8);
  v[12] ^= num_bytes_;
  if (last) v[14] = ~v[14];
  for (const auto& s : kSigma) {
    quarter(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
    quarter(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
    quarter(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
    quarter(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
    quarter(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
    quarter(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
    quarter(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
    quarter(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
  }
  for (size_t k = 0; k < 8; ++k) state_[k] ^= v[k] ^ v[k + 8];
}

void Blake2b128::update(const void* data, size_t num_bytes) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  while (num_bytes > 0) {
    // The last block waits for `finish`, which marks it, so a full one is flushed by what follows.
    if (num_buffered_ == kBlockBytes) {
      num_bytes_ += kBlockBytes;
      compress(block_.data(), false);
      num_buffered_ = 0;
    }
    while (num_buffered_ == 0 && num_bytes > kBlockBytes) {
      num_bytes_ += kBlockBytes;
      compress(bytes, false);
      bytes += kBlockBytes;
      num_bytes -= kBlockBytes;
    }
    const size_t taken = std::min(kBlockBytes - num_buffered_, num_bytes);
    std::memcpy(block_.data() + num_buffered_, bytes, taken);
    num_buffered_ += taken;
    bytes += taken;
    num_bytes -= taken;
  }
}

void Blake2b128::finish(uint8_t* digest) {
  num_bytes_ += num_buffered_;
  std::fill(block_.begin() + static_cast<std::ptrdiff_t>(num_buffered_), block_.end(), uint8_t{0});
  compress(block_.data(), true);
  for (size_t k = 0; k < kDigestBytes; ++k) {
    digest[k] = static_cast<uint8_t>(state_[k / 8] >> (8 * (k % 8)));
  }
}

}  // namespace chatflow

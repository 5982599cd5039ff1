#include "blake2b.h"

#include <algorithm>
#include <cstring>

namespace chatflow {
namespace {

constexpr size_t kDigestBytes = 16;

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

Blake2b128::Blake2b128() : state_(kBlake2bInitial) { state_[0] ^= 0x01010000u ^ kDigestBytes; }

void Blake2b128::compress(const uint8_t* block, bool last) {
  uint64_t m[16];
  for (int k = 0; k < 16; ++k) m[k] = load_little_endian(block + 8 * k);
  uint64_t v[16];
  std::copy(state_.begin(), state_.end(), v);
  std::copy(kBlake2bInitial.begin(), kBlake2bInitial.end(), v + 8);
  v[12] ^= num_bytes_;
  if (last) v[14] = ~v[14];
  for (const auto& s : kBlake2bSigma) {
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
    // A full block is kept until more data follows, because `finish` must mark the last block.
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

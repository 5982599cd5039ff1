#include "tree_hash.h"

#include <cstring>

#include "blake2b.h"

namespace chatflow {
namespace {

constexpr size_t kNumLanes = 8;
constexpr size_t kBlockBytes = 128;
constexpr int kNumRounds = 12;

/// One 64-bit word of eight leaves.
using Lanes = uint64_t __attribute__((vector_size(8 * kNumLanes)));

#define CHATFLOW_INLINE inline __attribute__((always_inline))

CHATFLOW_INLINE void rotate_right(Lanes* value, int count) {
  *value = *value >> count | *value << (64 - count);
}

CHATFLOW_INLINE void quarter(Lanes* v, int a, int b, int c, int d, const Lanes& x, const Lanes& y) {
  v[a] += v[b] + x;
  v[d] ^= v[a];
  rotate_right(&v[d], 32);
  v[c] += v[d];
  v[b] ^= v[c];
  rotate_right(&v[b], 24);
  v[a] += v[b] + y;
  v[d] ^= v[a];
  rotate_right(&v[d], 16);
  v[c] += v[d];
  v[b] ^= v[c];
  rotate_right(&v[b], 63);
}

/// Loads the words of a block of eight leaves; word k of lane l lies 8 k bytes into its leaf.
CHATFLOW_INLINE void load_block(const uint8_t* block, Lanes* words) {
  for (size_t k = 0; k < kBlockBytes / 8; ++k) {
    for (size_t lane = 0; lane < kNumLanes; ++lane) {
      uint64_t word;
      std::memcpy(&word, block + lane * kHashLeafBytes + 8 * k, 8);
      words[k][lane] = word;
    }
  }
}

CHATFLOW_INLINE void compress(Lanes* state, const Lanes* m, uint64_t num_hashed, bool last) {
  Lanes v[16];
  for (int k = 0; k < 8; ++k) {
    v[k] = state[k];
    v[k + 8] = Lanes{} + kBlake2bInitial[k];
  }
  v[12] ^= Lanes{} + num_hashed;
  v[14] ^= Lanes{} - static_cast<uint64_t>(last);
#pragma GCC unroll 12
  for (int round = 0; round < kNumRounds; ++round) {
    const uint8_t* s = kBlake2bSigma[round];
    quarter(v, 0, 4, 8, 12, m[s[0]], m[s[1]]);
    quarter(v, 1, 5, 9, 13, m[s[2]], m[s[3]]);
    quarter(v, 2, 6, 10, 14, m[s[4]], m[s[5]]);
    quarter(v, 3, 7, 11, 15, m[s[6]], m[s[7]]);
    quarter(v, 0, 5, 10, 15, m[s[8]], m[s[9]]);
    quarter(v, 1, 6, 11, 12, m[s[10]], m[s[11]]);
    quarter(v, 2, 7, 8, 13, m[s[12]], m[s[13]]);
    quarter(v, 3, 4, 9, 14, m[s[14]], m[s[15]]);
  }
  for (int k = 0; k < 8; ++k) state[k] ^= v[k] ^ v[k + 8];
}

/// Hashes eight consecutive whole leaves.
CHATFLOW_INLINE void hash_eight(const uint8_t* data, uint8_t* digests) {
  Lanes state[8];
  for (int k = 0; k < 8; ++k) state[k] = Lanes{} + kBlake2bInitial[k];
  state[0] ^= Lanes{} + (0x01010000u ^ kHashDigestBytes);
  for (size_t begin = 0; begin < kHashLeafBytes; begin += kBlockBytes) {
    Lanes words[16];
    load_block(data + begin, words);
    const size_t end = begin + kBlockBytes;
    compress(state, words, end, end == kHashLeafBytes);
  }
  for (size_t lane = 0; lane < kNumLanes; ++lane) {
    for (size_t k = 0; k < kHashDigestBytes / 8; ++k) {
      const uint64_t word = state[k][lane];
      std::memcpy(digests + lane * kHashDigestBytes + 8 * k, &word, 8);
    }
  }
}

void hash_eight_portable(const uint8_t* data, uint8_t* digests) { hash_eight(data, digests); }

using HashEight = void (*)(const uint8_t*, uint8_t*);

#if defined(__x86_64__)
__attribute__((target("avx2"))) void hash_eight_avx2(const uint8_t* data, uint8_t* digests) {
  hash_eight(data, digests);
}

__attribute__((target("avx512f"))) void hash_eight_avx512(const uint8_t* data, uint8_t* digests) {
  hash_eight(data, digests);
}

HashEight best_for_this_machine() {
  if (__builtin_cpu_supports("avx512f")) return hash_eight_avx512;
  if (__builtin_cpu_supports("avx2")) return hash_eight_avx2;
  return hash_eight_portable;
}
#else
HashEight best_for_this_machine() { return hash_eight_portable; }
#endif

}  // namespace

void hash_leaves(const uint8_t* data, size_t num_bytes, uint8_t* digests) {
  static const HashEight hash_group = best_for_this_machine();
  constexpr size_t kGroupBytes = kNumLanes * kHashLeafBytes;
  for (; num_bytes >= kGroupBytes; num_bytes -= kGroupBytes) {
    hash_group(data, digests);
    data += kGroupBytes;
    digests += kNumLanes * kHashDigestBytes;
  }
  while (num_bytes > 0) {
    const size_t size = num_bytes < kHashLeafBytes ? num_bytes : kHashLeafBytes;
    Blake2b128 hash;
    hash.update(data, size);
    hash.finish(digests);
    data += size;
    num_bytes -= size;
    digests += kHashDigestBytes;
  }
}

}  // namespace chatflow

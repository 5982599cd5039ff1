/// \file
/// Digests of the leaves of a file, which a checkpoint records while it writes its files.
///
/// A leaf is 64 KiB of the file; the last one may be shorter. Its digest is BLAKE2b with 16 bytes
/// and no key (RFC 7693), so that any implementation of BLAKE2b can check it. Leaves are
/// independent: eight are hashed at a time in the lanes of a vector, and threads may process a file
/// in any order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace chatflow {

constexpr size_t kHashLeafBytes = 65536;
constexpr size_t kHashDigestBytes = 16;

/// Hashes every leaf of a buffer.
///
/// \param data The bytes, from the begin of a leaf.
/// \param num_bytes Number of bytes.
/// \param digests Output, 16 bytes for each leaf.
void hash_leaves(const uint8_t* data, size_t num_bytes, uint8_t* digests);

}  // namespace chatflow

/// \file
/// The digests of a file's leaves: what a checkpoint records of its files while it writes them.
///
/// A leaf is 64 KiB of the file, the last one shorter. Its digest is BLAKE2b's with 16 bytes and no
/// key (RFC 7693), so that any BLAKE2b checks it. Leaves do not depend on each other: eight are
/// hashed side by side in the lanes of a vector, and threads take parts of a file in any order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace chatflow {

constexpr size_t kHashLeafBytes = 65536;
constexpr size_t kHashDigestBytes = 16;

/// Hashes every leaf of a buffer.
///
/// \param data The bytes; they begin at a leaf's begin.
/// \param num_bytes How many.
/// \param digests Receives 16 bytes for each leaf.
void hash_leaves(const uint8_t* data, size_t num_bytes, uint8_t* digests);

}  // namespace chatflow

"""Digests of a file's leaves: the reference, and the compiled one where it was built.

In: bytes. Out: 16 bytes of BLAKE2b (RFC 7693) for every 64 KiB, joined. Leaves do not depend on
each other, so threads hash parts of a file in any order, and the compiled code eight at a time.
"""

import hashlib
from typing import TypeAlias

from megatron_chatflow.native.extension import extension

Buffer: TypeAlias = bytes | bytearray | memoryview

LEAF_BYTES = 65536
DIGEST_BYTES = 16


def hash_leaves_reference(data: Buffer) -> bytes:
    """What `hash_leaves` does, one leaf after the other."""
    view = memoryview(data)
    leaves = (view[begin : begin + LEAF_BYTES] for begin in range(0, len(view), LEAF_BYTES))
    return b"".join(hashlib.blake2b(leaf, digest_size=DIGEST_BYTES).digest() for leaf in leaves)


def hash_leaves(data: Buffer) -> bytes:
    """The digests of all leaves of ``data``, which begins where a leaf begins.

    Other threads run meanwhile.
    """
    if extension is None:
        return hash_leaves_reference(data)
    digests: bytes = extension.hash_leaves(data)
    return digests


def root_digest(num_bytes: int, leaf_digests: bytes) -> str:
    """The digest of a whole file, in hexadecimal, from its length and its leaves' digests."""
    length = num_bytes.to_bytes(8, "little")
    return hashlib.blake2b(length + leaf_digests, digest_size=DIGEST_BYTES).hexdigest()

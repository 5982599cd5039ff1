"""Tests that compiled leaf digests equal BLAKE2b at every length around a leaf and a group."""

import numpy as np
import pytest

from megatron_chatflow.data.fingerprint import (
    DIGEST_BYTES,
    LEAF_BYTES,
    hash_leaves,
    hash_leaves_reference,
    root_digest,
)

pytestmark = pytest.mark.native

GROUP = 8 * LEAF_BYTES


@pytest.mark.parametrize(
    "num_bytes", [0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, GROUP, 2 * GROUP + 70001]
)
def test_compiled_digests_equal_the_reference(num_bytes: int) -> None:
    data = np.random.default_rng(num_bytes).bytes(num_bytes)
    digests = hash_leaves(data)
    assert digests == hash_leaves_reference(data)
    assert len(digests) == -(-num_bytes // LEAF_BYTES) * DIGEST_BYTES


def test_every_bit_counts() -> None:
    data = bytearray(np.random.default_rng(1).bytes(GROUP + 100))
    before = root_digest(len(data), hash_leaves(data))
    for place in (0, LEAF_BYTES - 1, LEAF_BYTES, GROUP - 1, GROUP, GROUP + 99):
        data[place] ^= 1
        assert root_digest(len(data), hash_leaves(data)) != before
        data[place] ^= 1
    assert root_digest(len(data), hash_leaves(data)) == before
    assert root_digest(1, b"") != root_digest(0, b"")

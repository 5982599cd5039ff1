"""Tests digests: golden values, and that every token and mask entry affects them."""

import numpy as np
import torch

from megatron_chatflow.data.loader import combine_digests, sample_digest

TOKENS = np.arange(9, dtype=np.int32)
MASK = np.ones(8, np.uint8)
GOLDEN_SAMPLE = [7092290005583499290, -2957034528776515230]
GOLDEN_BATCH = "caa6227ad44aa63d3f5249812eb9f2bf"


def test_golden_digests():
    digest = sample_digest(TOKENS, MASK)
    assert digest.dtype == np.int64
    assert digest.tolist() == GOLDEN_SAMPLE
    assert combine_digests(np.stack([digest, digest])) == GOLDEN_BATCH


def test_every_token_and_mask_counts():
    digests = {tuple(sample_digest(TOKENS, MASK).tolist())}
    for place in range(9):
        tokens = TOKENS.copy()
        tokens[place] += 1 << 30
        digests.add(tuple(sample_digest(tokens, MASK).tolist()))
    for place in range(8):
        mask = MASK.copy()
        mask[place] = 0
        digests.add(tuple(sample_digest(TOKENS, mask).tolist()))
    assert len(digests) == 18


def test_the_order_of_samples_counts_and_tensors_will_do():
    rows = np.arange(8, dtype=np.int64).reshape(4, 2)
    assert combine_digests(rows) != combine_digests(rows[::-1])
    assert combine_digests(torch.from_numpy(rows)) == combine_digests(rows)
    padded = torch.from_numpy(np.hstack([np.zeros((4, 1), np.int64), rows]))
    assert combine_digests(padded[:, 1:]) == combine_digests(rows)

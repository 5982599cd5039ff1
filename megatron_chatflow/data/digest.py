"""Hashes of samples and of batches, by which two runs are compared.

In: a sample's tokens and loss mask. Out: 128 bits a sample, and one hex string a global batch that
does not depend on how the batch was cut into ranks and micro-batches.
"""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

_DIGEST_BYTES = 16


def sample_digest(
    tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Hashes one sample: blake2b-128 of its tokens, little endian, and then of its loss mask.

    Args:
        tokens: int32[seq_length + 1].
        loss_mask: uint8[seq_length].

    Returns:
        int64[2], the digest's 16 bytes as two little-endian words.
    """
    digest = blake2b(tokens.astype("<i4", copy=False).tobytes(), digest_size=_DIGEST_BYTES)
    digest.update(loss_mask.tobytes())
    return np.frombuffer(digest.digest(), "<i8").astype(np.int64)


def combine_digests(digests: torch.Tensor | npt.NDArray[np.int64]) -> str:
    """Hashes a batch: blake2b-128 of its samples' digests in the order of the samples.

    Args:
        digests: int64[num_samples, 2], a row per sample, ascending by global sample number.

    Returns:
        32 hex digits.
    """
    rows = np.asarray(digests).astype("<i8", copy=False)
    return blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=_DIGEST_BYTES).hexdigest()

"""Hashes of samples and of batches, by which two runs are compared.

In: a sample's tokens and loss mask. Out: 128 bits a sample, and one hex string a global batch that
does not depend on how the batch was cut into ranks and micro-batches.
"""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.native.loader import DIGEST_BYTES, sample_digest

__all__ = ["combine_digests", "sample_digest"]


def combine_digests(digests: torch.Tensor | npt.NDArray[np.int64]) -> str:
    """Hashes a batch: blake2b-128 of its samples' digests in the order of the samples.

    Args:
        digests: int64[num_samples, 2], a row per sample, ascending by global sample number.

    Returns:
        32 hex digits.
    """
    rows = np.asarray(digests).astype("<i8", copy=False)
    return blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=DIGEST_BYTES).hexdigest()

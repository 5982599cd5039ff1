"""Token files of a source, opened and checked against one another.

In: prefixes of indexed datasets. Out: `TokenFile` objects, mapped, which windows and packed samples
are read from.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.errors import UserError
from megatron_chatflow.native.samples import Runs, Sample, SampleShape, TokenFile

__all__ = ["Runs", "Sample", "SampleShape", "TokenFile", "document_begins", "open_token_file"]


def open_token_file(prefix: str | Path, *, with_loss_mask: bool) -> TokenFile:
    """Maps a dataset, and its loss masks if they are wanted.

    Args:
        prefix: Path without `.bin` or `.idx`.
        with_loss_mask: Whether the loss counts marked tokens only.

    Raises:
        UserError: A file is missing or damaged, holds no integers, or the masks do not fit.
    """
    dataset = IndexedDataset(prefix)
    if dataset.dtype.kind not in "iu":
        raise UserError(f"no token ids: {prefix}: holds {dataset.dtype}: preprocess the text")
    return TokenFile(
        name=str(prefix),
        tokens=dataset.tokens,
        sequence_pointers=dataset.sequence_pointers,
        document_indices=dataset.document_indices,
        loss_mask=_open_loss_mask(prefix, dataset) if with_loss_mask else None,
    )


def _open_loss_mask(prefix: str | Path, dataset: IndexedDataset) -> npt.NDArray[np.uint8]:
    mask_prefix = loss_mask_prefix(prefix)
    remedy = "preprocess with --format chat or pairs, or set loss: all"
    try:
        masks = IndexedDataset(mask_prefix)
    except UserError as error:
        raise UserError(f"no loss masks for {prefix}: {error}: {remedy}") from error
    if masks.dtype != np.uint8:
        raise UserError(f"no loss masks: {mask_prefix}: holds {masks.dtype}, not uint8: {remedy}")
    if not np.array_equal(masks.sequence_lengths, dataset.sequence_lengths):
        raise UserError(
            f"loss masks do not fit: {mask_prefix}: its lengths differ from {prefix}'s: {remedy}"
        )
    return np.asarray(masks.tokens, dtype=np.uint8)


def document_begins(file: TokenFile, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The tokens at which documents begin.

    Args:
        file: The token file.
        documents: int64[n], each in [0, num_documents]; the last means the end of the file.

    Returns:
        int64[n].
    """
    sequences = file.document_indices[documents]
    begins = np.full(len(sequences), len(file.tokens), np.int64)
    inside = sequences < len(file.sequence_pointers)
    begins[inside] = file.sequence_pointers[sequences[inside]] // file.tokens.itemsize
    return begins

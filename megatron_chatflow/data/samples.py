"""What a sample is, and the token files that samples are read from.

In: prefixes of indexed datasets. Out: `TokenFile` objects, mapped and checked against one another,
from which `windows` and `packing` read.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.errors import UserError
from megatron_chatflow.native.samples import TokenFile


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        tokens: int32[seq_length + 1].
        loss_mask: uint8[seq_length], aligned with the labels ``tokens[1:]``.
        cu_seqlens: int32[num_segments + 1], begins of the attention segments, from 0 to seq_length.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    cu_seqlens: npt.NDArray[np.int32]


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
        int64[n], each in [0, num_tokens].

    Raises:
        UserError: The index points elsewhere.
    """
    num_tokens = len(file.tokens)
    sequences = file.document_indices[documents]
    inside = sequences < len(file.sequence_pointers)
    begins = np.full(len(sequences), num_tokens, np.int64)
    begins[inside] = file.sequence_pointers[sequences[inside].clip(0)] // file.tokens.itemsize
    check_index(file, (sequences >= 0) & (begins >= 0) & (begins <= num_tokens))
    return begins


def check_index(file: TokenFile, holds: npt.NDArray[np.bool_]) -> None:
    """Refuses a file whose documents do not follow one another.

    Args:
        file: The token file.
        holds: What must be true of each document.

    Raises:
        UserError: It is not.
    """
    if not holds.all():
        raise UserError(
            f"damaged index: {file.name}.idx: its documents do not follow one another: copy or "
            "preprocess it again"
        )

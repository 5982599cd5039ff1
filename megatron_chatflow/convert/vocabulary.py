"""Creates embedding and output rows for the new pieces of an extended vocabulary.

Old rows are kept bit for bit. Input and output rows are created separately, each from the old rows
of the same tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from megatron_chatflow.config.sections import EmbeddingInit
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer

EMBEDDING_INITS: tuple[EmbeddingInit, ...] = get_args(EmbeddingInit)
# Offsets of the seed by Hugging Face's names of the vocabulary tensors.
_SEED_OFFSETS = {"model.embed_tokens.weight": 0, "lm_head.weight": 1}
_BLOCK = 512  # rows created at a time, which bounds the memory of random numbers


@dataclass(frozen=True)
class Resize:
    """A larger vocabulary for a model."""

    tokenizer: Tokenizer  # the new tokenizer, which extends the model's
    init: EmbeddingInit = "mean-of-pieces"  # the initialization of rows for new pieces
    seed: int = 1234  # the seed of random rows, and of the choice of text for ``distill``
    distill_text: Iterable[str] = ()  # the documents that ``distill`` fits to, read once
    distill_tokens: int = 100_000  # maximum number of tokens of text that ``distill`` uses
    # The rows of new pieces by Hugging Face's name of the tensor, once ``distill`` has fitted them.
    rows: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class VocabularyGrowth:
    """The difference between an extended vocabulary and the old one."""

    num_old: int  # number of pieces of the old vocabulary, which keep their ids
    # for each new id, the old ids of its text; () if it has no text
    pieces: tuple[tuple[int, ...], ...]
    num_rows: int  # number of rows of the resized model

    @property
    def new_rows(self) -> tuple[int, int] | None:
        """The first and the end of the new pieces' rows; None if there are no new pieces."""
        return (self.num_old, self.num_old + len(self.pieces)) if self.pieces else None


@dataclass(frozen=True)
class GrownVocabulary:
    """A larger vocabulary for weights that are being loaded."""

    growth: VocabularyGrowth  # the new pieces
    resize: Resize  # the initialization of their rows
    num_old_rows: int  # number of rows of the stored weights, without padding


def vocabulary_growth(old: Tokenizer, new: Tokenizer, num_rows: int) -> VocabularyGrowth:
    """Finds the old pieces of the text of each new piece.

    ``num_rows`` is the number of rows of the model. A model with more rows than the new vocabulary
    keeps them.

    Raises:
        UserError: `new` does not extend `old`.
    """
    if new.vocab_size < old.vocab_size:
        raise UserError(
            f"{new.model_path}: has {new.vocab_size} tokens, fewer than the {old.vocab_size} of "
            f"{old.model_path}; a vocabulary can only grow"
        )
    for token_id in range(old.vocab_size):
        if old.decode([token_id]) != new.decode([token_id]):
            raise UserError(
                f"{new.model_path}: id {token_id} is {new.decode([token_id])!r}, but "
                f"{old.decode([token_id])!r} in {old.model_path}; extend that tokenizer instead"
            )
    # Decode each piece after another one, because decoders drop a leading space of a text.
    anchor = old.encode("a")[-1:]
    start = len(new.decode(anchor))
    pieces = []
    for token_id in range(old.vocab_size, new.vocab_size):
        text = new.decode([*anchor, token_id])[start:]
        is_text = bool(text) and "\ufffd" not in text
        pieces.append(tuple(old.encode_continuation(text)) if is_text else ())
    return VocabularyGrowth(old.vocab_size, tuple(pieces), max(num_rows, new.vocab_size))


def grow_tensor(
    name: str, tensor: torch.Tensor, growth: VocabularyGrowth, resize: Resize
) -> torch.Tensor:
    """Returns a tensor of the resized model; only vocabulary tensors change.

    ``name`` is Hugging Face's; ``tensor`` has no padding rows.
    """
    offset = _SEED_OFFSETS.get(name)
    if offset is None:
        return tensor
    grown = grow_rows(tensor, growth, resize.init, resize.seed + offset)
    if resize.rows is not None:
        rows = resize.rows[name]
        grown[growth.num_old : growth.num_old + len(rows)] = rows.to(grown.dtype)
    return grown


def grow_rows(
    rows: torch.Tensor, growth: VocabularyGrowth, init: EmbeddingInit, seed: int
) -> torch.Tensor:
    """Adds rows for the new pieces.

    Args:
        rows: [old rows, hidden], of which the first `growth.num_old` belong to pieces.
        growth: The new pieces.
        init: ``mean-of-pieces``: the mean of the rows of the piece's old pieces (ChatFlow, arXiv
            2405.10626); ``copy-first-piece``: the row of the first of them; ``mean``: the mean of
            all old rows; ``normal``: drawn from a normal distribution with the old rows' mean and
            covariance (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models",
            2021); ``distill``: as ``mean-of-pieces``, from which `convert.distill` starts.
        seed: The seed of random rows.

    Returns:
        [growth.num_rows, hidden] of the same dtype, with unchanged old rows.
    """
    grown = torch.zeros(growth.num_rows, rows.shape[1], dtype=rows.dtype)
    grown[: len(rows)] = rows
    known = rows[: growth.num_old].float()
    mean = known.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, len(growth.pieces), _BLOCK):
        block = growth.pieces[begin : begin + _BLOCK]
        if init == "normal":
            made = _normal(known, mean, len(block), generator)
        elif init == "mean":
            made = mean.expand(len(block), -1)
        else:
            made = torch.stack([_from_pieces(known, mean, ids, init) for ids in block])
        first = growth.num_old + begin
        grown[first : first + len(block)] = made.to(rows.dtype)
    return grown


def _from_pieces(
    known: torch.Tensor, mean: torch.Tensor, ids: Sequence[int], init: EmbeddingInit
) -> torch.Tensor:
    """Returns one row from the rows of its old pieces, or the mean of all rows if it has none."""
    if not ids:
        return mean
    if init == "copy-first-piece":
        return known[ids[0]]
    return known[list(ids)].mean(dim=0)


def _normal(
    known: torch.Tensor, mean: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Draws rows: normally weighted sums of centered old rows have the old rows' covariance."""
    weights = torch.randn(count, len(known), generator=generator)
    drawn: torch.Tensor = weights @ (known - mean) / float(max(len(known) - 1, 1)) ** 0.5
    return mean + drawn

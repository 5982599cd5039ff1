"""Selectors: which tensors, and which of their rows, a stage of training trains.

A selector is a word, a range or a pattern:

- ``all``, ``embeddings``, ``output``: every tensor, the embedding, the output layer. With tied
  embeddings the last two are the same tensor.
- ``new_rows``: the rows of the embedding and the output layer whose tokens the tokenizer added to
  the one of the initial weights.
- ``rows.49152-`` or ``rows.100-199``: these rows of the embedding and the output layer.
- ``layers.3`` or ``layers.0-3``: every tensor of these layers, counted from 0.
- anything else: a pattern as in a shell for the names of tensors in checkpoints, such as
  ``decoder.layers.*.mlp.*`` or ``decoder.final_layernorm.weight``.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from megatron_chatflow.config.problems import did_you_mean
from megatron_chatflow.errors import UserError

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
WORDS = ("all", "embeddings", "output", "new_rows")
_LAYERS = re.compile(r"layers\.([0-9]{1,6})(?:-([0-9]{1,6}))?")
_ROWS = re.compile(r"rows\.([0-9]{1,12})-([0-9]{0,12})")
_LAYER_OF = re.compile(r"decoder\.layers\.([0-9]+)\.")

Rows = tuple[int, int]
"""The first row, and the row after the last."""
ALL_ROWS: Rows = (0, 2**62)


def parse_selector(value: str) -> str:
    """Checks the form of a selector, not whether the model has what it selects.

    Raises:
        UserError: It is neither a word nor a range nor a pattern, or a range is empty.
    """
    for form in (_LAYERS, _ROWS):
        match = form.fullmatch(value)
        if match is not None:
            if match[2] and int(match[2]) < int(match[1]):
                raise UserError(f"{value}: ends before it begins; write the smaller number first")
            return value
    if value.startswith(("layers.", "rows.")):
        raise UserError(f"{value}: must be a range such as layers.0-3, rows.100-199 or rows.49152-")
    if value not in WORDS and not any(sign in value for sign in ".*?["):
        raise UserError(
            f"{value}: is not a selector{did_you_mean(value, WORDS)}; use {', '.join(WORDS)}, "
            "layers.0-3, rows.49152-, or a pattern such as decoder.layers.*.mlp.*"
        )
    return value


def selects_rows(selector: str) -> bool:
    """Returns whether a selector selects only some rows of a tensor."""
    return selector == "new_rows" or _ROWS.fullmatch(selector) is not None


def select(
    selector: str, tensor: str, *, is_tied: bool = False, new_rows: Rows | None = None
) -> Rows | None:
    """Returns the rows of a tensor that a selector selects; None for none.

    Args:
        selector: A selector that `parse_selector` accepts.
        tensor: The name of a tensor in checkpoints, with the number of its layer.
        is_tied: Whether the embedding is also the output layer.
        new_rows: The rows of ``new_rows``; None if there are none.
    """
    rows = _ROWS.fullmatch(selector)
    if selector == "new_rows" or rows is not None:
        if tensor not in (EMBEDDING, OUTPUT):
            return None
        if rows is None:
            return new_rows
        return int(rows[1]), int(rows[2]) + 1 if rows[2] else ALL_ROWS[1]
    layers = _LAYERS.fullmatch(selector)
    if layers is not None:
        layer = _LAYER_OF.match(tensor)
        first, last = int(layers[1]), int(layers[2] or layers[1])
        is_selected = layer is not None and first <= int(layer[1]) <= last
    elif selector in WORDS:
        names = {"embeddings": EMBEDDING, "output": EMBEDDING if is_tied else OUTPUT}
        is_selected = selector == "all" or names[selector] == tensor
    else:
        is_selected = fnmatchcase(tensor, selector)
    return ALL_ROWS if is_selected else None


def merge_rows(ranges: Iterable[Rows]) -> tuple[Rows, ...]:
    """Returns the union of ranges of rows, in ascending order and disjoint."""
    merged: list[Rows] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)

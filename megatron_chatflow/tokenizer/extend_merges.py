"""Adds pieces to a byte-level `tokenizer.json` as merges, as if its training had gone on.

In: the file's content and pieces. Out: the content with them in vocabulary and merges, behind all
that is there. A piece is joined from left to right out of what the tokenizer so far makes of it;
what comes about on the way and is in no vocabulary (the first bytes of a character) gets an id too.

Old ids stay, and so does old text, unless it holds the same bytes: a character that shares its
first bytes with a new one may become that part and its last byte. Against tokens that are found
before text is cut, merges make longer pieces possible, cost nothing when there are thousands of
them, and never cut a word that the pre-tokenizer leaves whole. Where old merges join the bytes of
neighbouring characters, those keep the old ids.
"""

from collections.abc import Sequence
from typing import Any

from megatron_chatflow.errors import UserError


def with_merges(
    content: dict[str, Any], pieces: Sequence[str], first_id: int
) -> tuple[dict[str, Any], list[int]]:
    """Adds pieces.

    Args:
        content: Of a `tokenizer.json`; it is left as it is.
        pieces: Text.
        first_id: Behind all ids that there are.

    Returns:
        The new content, and the id of each piece.

    Raises:
        UserError: It is not a byte-level byte-pair model.
    """
    model = content["model"]
    if model.get("type") != "BPE" or "ByteLevel" not in str(content.get("pre_tokenizer")):
        raise UserError("merges can be added to byte-level byte-pair models alone; add tokens")
    vocabulary: dict[str, int] = dict(model["vocab"])
    are_lists = not model["merges"] or isinstance(model["merges"][0], list)
    merges = [tuple(m) if are_lists else tuple(m.split(" ")) for m in model["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    alphabet = byte_alphabet()
    next_id = first_id
    ids = []
    for piece in pieces:
        spelt = "".join(alphabet[byte] for byte in piece.encode())
        while len(symbols := _merged(spelt, ranks)) > 1:
            left, right = symbols[:2]
            if left + right not in vocabulary:
                vocabulary[left + right] = next_id
                next_id += 1
            ranks[left, right] = len(ranks)
        ids.append(vocabulary[spelt])
    written = [list(m) if are_lists else " ".join(m) for m in ranks]
    return {**content, "model": {**model, "vocab": vocabulary, "merges": written}}, ids


def byte_alphabet() -> list[str]:
    """The character that byte-level models write for each byte: itself where it is printable.

    (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, its encoder.)
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _merged(text: str, ranks: dict[tuple[str, ...], int]) -> list[str]:
    """What merges make of a text: the earliest joins first."""
    symbols = list(text)
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:], strict=False))
        rank, at = min((ranks.get(pair, len(ranks)), k) for k, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = ["".join(pairs[at])]
    return symbols

"""What an extended vocabulary gains, and out of what its new pieces were made before.

In: the tokenizer before and after, and text that had no part in the choice of pieces. Out: lines to
print.
"""

from collections.abc import Iterator, Mapping, Sequence

from megatron_chatflow.tokenizer.base import Tokenizer
from megatron_chatflow.tokenizer.extend import tokens_per_character

_NUM_SHOWN = 8


def growth_lines(
    old: Tokenizer, new: Tokenizer, pieces: Sequence[str], held_out: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Lines about an extension.

    Args:
        old: The tokenizer before.
        new: After.
        pieces: What was added.
        held_out: Documents by name, of a language each.
    """
    num_parts = new.vocab_size - old.vocab_size - len(pieces)
    parts = f" and {num_parts} parts of them" if num_parts > 0 else ""
    yield f"added {len(pieces)} pieces{parts}: {old.vocab_size} -> {new.vocab_size}"
    for name, texts in held_out.items():
        if not texts:
            continue
        before, after = (tokens_per_character(tokenizer, texts) for tokenizer in (old, new))
        yield f"tokens a character, {name} ({len(texts)} documents): {before:.3f} -> {after:.3f}"
    decompositions = [old.encode_continuation(piece) for piece in pieces]
    mean = sum(map(len, decompositions)) / max(1, len(pieces))
    yield f"a new piece was {mean:.2f} old ones, whose embeddings its own can begin with, such as"
    for piece, ids in list(zip(pieces, decompositions, strict=True))[:_NUM_SHOWN]:
        spelt = " ".join(f"{token_id}:{old.decode([token_id])!r}" for token_id in ids)
        yield f"  {piece} = {spelt}"

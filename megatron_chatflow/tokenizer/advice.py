"""Estimates whether a vocabulary extension pays off.

New tokens make text shorter, which saves computation, but the output layer grows, and a new token
has to be read many times before the model predicts it as well as its old pieces. The estimate has
two parts. The cost of a character is the number of tokens per character times the FLOPs of a
training step per token, including the output layer.

The break-even point uses a simple model. The gap between the loss of the extended and of the
original model is ``g / (1 + n / K)`` after the new tokens have been read ``n`` times each on
average, where ``g`` is the gap at the start. The text that is read until the gap is
`NEGLIGIBLE_GAP` teaches the extended model only what the other one already knows. If that text has
``D`` characters, both have learned equally much from the same computation when ``C / new cost - D =
C / old cost``. `HALF_LIFE` was fitted to the SmolLM2 example: a gap of 1.067 bits per byte fell to
0.291 in 180 iterations, in which a new token was read 100 times on average. On the
held-out text of today's page it fell from 1.256 to 0.324, which gives 35 reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_chatflow.config import ModelConfig
from megatron_chatflow.config.shape import flops_per_token
from megatron_chatflow.tokenizer import Tokenizer

HALF_LIFE = 38.0  # K: reads of a new token that halve the gap
NEGLIGIBLE_GAP = 0.05  # bits per byte
DEFAULT_START_GAP = 1.0  # bits per byte


@dataclass(frozen=True)
class Fertility:
    """Tokens of a text before (``old``) and after (``new``) the extension."""

    num_characters: int
    num_bytes: int  # in UTF-8
    num_old_tokens: int
    num_new_tokens: int
    num_added: int  # tokens of the extended text that the old vocabulary lacks

    @classmethod
    def of(cls, old: Tokenizer, new: Tokenizer, texts: Sequence[str]) -> "Fertility":
        """Counts the tokens of the texts."""
        encoded = new.encode_batch(texts)
        return cls(
            num_characters=sum(map(len, texts)),
            num_bytes=sum(len(text.encode("utf-8", "replace")) for text in texts),
            num_old_tokens=sum(map(len, old.encode_batch(texts))),
            num_new_tokens=sum(map(len, encoded)),
            num_added=sum(token_id >= old.vocab_size for ids in encoded for token_id in ids),
        )


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of a model before and after the extension, and the break-even point.

    Attributes:
        old_flops_per_character: Of the original model.
        new_flops_per_character: Of the extended model.
        start_gap: The gap of the loss at the start, in bits per byte.
        reads_per_token: Reads of each new token, on average, until the gap is negligible.
        catch_up_tokens: Tokens of text until then, in the new vocabulary.
        break_even_tokens: Tokens of this text, in the new vocabulary, after which the extended
            model has learned more from the same computation; None if it never does.
    """

    old_flops_per_character: float
    new_flops_per_character: float
    start_gap: float
    reads_per_token: float
    catch_up_tokens: float | None
    break_even_tokens: float | None


def cost_of_extension(
    model: ModelConfig,
    seq_length: int,
    old: Tokenizer,
    new: Tokenizer,
    fertility: Fertility,
    start_gap: float,
) -> Cost:
    """Estimates the cost of a character and the break-even point.

    Args:
        model: The model's shape.
        seq_length: Tokens of a sample, on which the cost of attention depends.
        old: The tokenizer of the model.
        new: The extended tokenizer.
        fertility: The tokens of a text in the new language.
        start_gap: How much the loss rises at first, in bits per byte.
    """
    num_rows = max(old.vocab_size, model.vocab_size or 0)
    # The lookup of input rows costs nothing, so only the output layer counts.
    model = replace(model, untie_embeddings_and_output_weights=False)
    before, after = (
        flops_per_token(model, rows, seq_length) * num_tokens / max(1, fertility.num_characters)
        for rows, num_tokens in (
            (num_rows, fertility.num_old_tokens),
            (max(num_rows, new.vocab_size), fertility.num_new_tokens),
        )
    )
    reads = HALF_LIFE * max(0.0, start_gap / NEGLIGIBLE_GAP - 1)
    if not fertility.num_added:
        return Cost(before, after, start_gap, reads, None, None)
    num_new = new.vocab_size - old.vocab_size
    catch_up = reads * num_new * fertility.num_new_tokens / fertility.num_added
    pays = after < before
    return Cost(
        old_flops_per_character=before,
        new_flops_per_character=after,
        start_gap=start_gap,
        reads_per_token=reads,
        catch_up_tokens=catch_up,
        break_even_tokens=catch_up / (1 - after / before) if pays else None,
    )


def advice_lines(fertility: Mapping[str, Fertility], costs: Mapping[str, Cost]) -> Iterator[str]:
    """Formats the advice as tables, one line for each text."""
    if fertility:
        yield f"{'text':<28}{'tokens/character':>22}{'tokens/byte':>20}{'new tokens':>12}"
    for name, f in fertility.items():
        per_character = _pair(f.num_old_tokens, f.num_new_tokens, f.num_characters)
        per_byte = _pair(f.num_old_tokens, f.num_new_tokens, f.num_bytes)
        share = f"{f.num_added / max(1, f.num_new_tokens):.1%}"
        yield f"{name:<28.28}{per_character:>22}{per_byte:>20}{share:>12}"
    if costs:
        yield f"{'text':<28}{'MFLOPs/character':>22}{'change':>10}{'break-even tokens':>22}"
    for name, c in costs.items():
        flops = f"{c.old_flops_per_character / 1e6:.0f} -> {c.new_flops_per_character / 1e6:.0f}"
        change = f"{c.new_flops_per_character / c.old_flops_per_character - 1:+.0%}"
        tokens = "never" if c.break_even_tokens is None else f"{c.break_even_tokens:,.0f}"
        yield f"{name:<28.28}{flops:>22}{change:>10}{tokens:>22}"


def advice_report(fertility: Mapping[str, Fertility], costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Returns the object for a JSON report: the numbers and the model's constants by text."""
    return {
        "half_life": HALF_LIFE,
        "negligible_gap": NEGLIGIBLE_GAP,
        "texts": {
            name: {**asdict(f), **(asdict(costs[name]) if name in costs else {})}
            for name, f in fertility.items()
        },
    }


def _pair(old: int, new: int, unit: int) -> str:
    return f"{old / max(1, unit):.3f} -> {new / max(1, unit):.3f}"

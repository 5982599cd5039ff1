"""Filters sentence pairs: lengths, languages and numbers of the two sides must match."""

import re

from examples.corpus.text import num_han, tidy, to_chinese_marks, to_half_width

_NUMBER = re.compile(r"\d[\d,]*\d")
_MARKUP = re.compile(
    r"</?[a-zA-Z][^<>]{0,200}>|\{\{|\}\}|\[\[|\]\]|\(http|\]\(|&[a-z]{2,6};|\*\*|```"
)
_MIN_RATIO, _MAX_RATIO = 0.8, 7.0
_MAX_CHARACTERS = 1500


def make_pair(en: str, zh: str, *, min_han: int) -> dict[str, str] | None:
    """Returns a pair, or None if the texts do not match.

    Args:
        en: English text.
        zh: Chinese text.
        min_han: Minimum number of Chinese characters of `zh`.
    """
    en, zh = tidy(en), to_chinese_marks(tidy(to_half_width(zh)))
    han = num_han(zh)
    if not en or num_han(en) or han < min_han or max(len(en), len(zh)) > _MAX_CHARACTERS:
        return None
    if not re.search(r"[A-Za-z]{2}", en) or _MARKUP.search(en) or _MARKUP.search(zh):
        return None
    if not _MIN_RATIO <= len(en) / len(zh) <= _MAX_RATIO:
        return None
    # Mostly untranslated.
    if han < 0.3 * len(zh):
        return None
    if en.count("\n") != zh.count("\n") or _numbers(en) != _numbers(zh):
        return None
    return {"en": en, "zh": zh}


def _numbers(text: str) -> list[str]:
    """Returns the numbers with at least two digits, sorted as strings."""
    return sorted(number.replace(",", "") for number in _NUMBER.findall(text))

"""Matches language tags with the languages of a pair, and identifies the language of a text.

Tags are those of BCP 47, in any case and with underscores or hyphens: `zh`, `zh-CN`, `zh_Hans_CN`.
A tag belongs to a language if it is the same tag or a variant of it, so `zh-CN` belongs to `zh`,
but not to `zh-TW`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

from megatron_chatflow.errors import UserError

_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")
# Texts that are identified with less confidence, such as names and numbers, count as any language.
MIN_CONFIDENCE = 0.5
MAX_IDENTIFIED_CHARACTERS = 4000  # the language is identified by the beginning of a text
# The model takes many short Chinese texts for Wu or Cantonese.
_VARIETIES = {"wuu": "zh", "yue": "zh"}


def is_language_code(text: str) -> bool:
    """Returns whether a text has the form of a language tag such as "zh" or "zh-CN"."""
    return _CODE.fullmatch(text) is not None


def is_variant(tag: str, code: str) -> bool:
    """Returns whether ``tag`` is the language ``code`` or one of its variants."""
    tag, code = _normalized(tag), _normalized(code)
    return tag == code or tag.startswith(f"{code}-")


@lru_cache(1024)  # called for every text of a translation memory, with few different tags
def matching_code(tag: str, codes: tuple[str, ...]) -> int | None:
    """Returns the index of the longest of the codes that a tag is a variant of, else None.

    Of "zh" and "zh-TW", "zh-TW" therefore belongs to the second only.
    """
    found = [k for k, code in enumerate(codes) if is_variant(tag, code)]
    return max(found, key=lambda k: len(codes[k]), default=None)


def find_language(tags: Sequence[str], code: str, codes: tuple[str, ...]) -> int | None:
    """Returns the index of the tag that is ``code``, else of its first variant, else None.

    Variants that belong to another of the ``codes``, as in `matching_code`, are left out.
    """
    position = codes.index(code)
    variants = [k for k, tag in enumerate(tags) if matching_code(tag, codes) == position]
    if len(variants) > 1:
        exact = [k for k in variants if _normalized(tags[k]) == _normalized(code)]
        variants = [*exact, *variants]
    return variants[0] if variants else None


def is_identified_as_other(text: str, code: str) -> bool:
    """Returns whether a text is identified, with some confidence, as another language.

    Variants of a language are not told apart; see `language_identifier`.

    Raises:
        UserError: py3langid is not installed, or does not know the language.
    """
    labels = _model().labels
    language = _normalized(code).split("-")[0]
    if language not in labels:
        raise UserError(
            f"--pair-identify-languages: {code}: is not among the languages that can be "
            f"identified ({' '.join(sorted(labels))}): set --pair-keys or --pair-languages to "
            "language codes"
        )
    found, confidence = language_identifier()(text)
    return found != _VARIETIES.get(language, language) and confidence >= MIN_CONFIDENCE


@cache
def language_identifier() -> Callable[[str], tuple[str, float]]:
    """Returns a function that returns the language of a text and its probability.

    The language is a code of ISO 639-1, such as "en" or "zh"; "zh" includes `_VARIETIES`. It is
    identified by the first `MAX_IDENTIFIED_CHARACTERS` of the text. The model is part of the
    package py3langid; nothing is downloaded.

    Raises:
        UserError: py3langid is not installed.
    """
    model = _model()

    def identify(text: str) -> tuple[str, float]:
        probabilities: defaultdict[str, float] = defaultdict(float)
        for language, probability in model.rank(text[:MAX_IDENTIFIED_CHARACTERS]):
            probabilities[_VARIETIES.get(language, language)] += probability
        return max(probabilities.items(), key=lambda item: item[1])

    return identify


@cache
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError("languages are identified by py3langid: pip install py3langid") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _normalized(tag: str) -> str:
    return tag.replace("_", "-").lower()

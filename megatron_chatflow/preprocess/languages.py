"""Matches language tags with the languages of a pair, and identifies the language of a text.

Tags are those of BCP 47, in any case and with underscores or hyphens: `zh`, `zh-CN`, `zh_Hans_CN`.
A tag belongs to a language if it is the same tag or a variant of it, so `zh-CN` belongs to `zh`,
but not to `zh-TW`.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from megatron_chatflow.errors import UserError

_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")
# Texts that are identified with less confidence, such as names and numbers, count as any language.
MIN_CONFIDENCE = 0.5


def is_language_code(text: str) -> bool:
    """Returns whether a text has the form of a language tag such as "zh" or "zh-CN"."""
    return _CODE.fullmatch(text) is not None


def is_variant(tag: str, code: str) -> bool:
    """Returns whether ``tag`` is the language ``code`` or one of its variants."""
    tag, code = _normalized(tag), _normalized(code)
    return tag == code or tag.startswith(f"{code}-")


def find_language(tags: Sequence[str], code: str) -> int | None:
    """Returns the index of the tag that is ``code``, else of its first variant, else None."""
    variants = [k for k, tag in enumerate(tags) if is_variant(tag, code)]
    exact = [k for k in variants if _normalized(tags[k]) == _normalized(code)]
    return next(iter([*exact, *variants]), None)


def is_identified_as_other(text: str, code: str) -> bool:
    """Returns whether a text is identified, with some confidence, as another language.

    The model of py3langid, which is part of its package, identifies 97 languages without their
    variants.

    Raises:
        UserError: py3langid is not installed, or does not know the language.
    """
    identifier = _identifier()
    language = _normalized(code).split("-")[0]
    if language not in identifier.labels:
        raise UserError(
            f"--pair-identify-languages: {code}: is not among the languages that can be "
            f"identified ({' '.join(sorted(identifier.labels))}): set --pair-keys or "
            "--pair-languages to language codes"
        )
    found, confidence = identifier.classify(text)
    return bool(found != language and confidence >= MIN_CONFIDENCE)


@cache
def _identifier() -> Any:
    try:
        from py3langid import langid
    except ImportError as error:
        raise UserError(
            "--pair-identify-languages needs py3langid: pip install py3langid"
        ) from error
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _normalized(tag: str) -> str:
    return tag.replace("_", "-").lower()

"""The known name that a misspelt one probably meant.

In: a word and the known words. Out: a piece of a message.
"""

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)``, or nothing where no known word is near."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""

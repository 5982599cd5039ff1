"""The known name that a misspelt one probably meant."""

import difflib
from collections.abc import Iterable

_CUTOFF = 0.8
"""Below this likeness a name is another one, not a misspelt one."""


def closest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)``, or nothing where no known word is spelt nearly like it.

    Dashes in front do not count: they would make all flags alike.
    """
    names = {name.lstrip("-"): name for name in known}
    matches = difflib.get_close_matches(word.lstrip("-"), list(names), n=1, cutoff=_CUTOFF)
    return f" (did you mean {names[matches[0]]}?)" if matches else ""

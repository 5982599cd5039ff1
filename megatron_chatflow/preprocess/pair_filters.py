"""Filters that compare the two sides of a pair: scripts, numbers, punctuation.

They are meant for pairs that were mined or extracted automatically. All are off unless a setting of
`PairSettings` turns them on.
"""

import re
import unicodedata
from bisect import bisect_right

# The Unicode blocks of each script, as first and last code point.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x24F), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xFF21, 0xFF5A)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F),),
    "hebrew": ((0x590, 0x5FF),),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "devanagari": ((0x900, 0x97F),),
    "thai": ((0xE00, 0xE7F),),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
}
ANY_SCRIPT = "any"
# Digits of any script, with the separators of thousands that English and French use.
_NUMBER = re.compile(r"\d{1,3}(?:[,\u00a0\u202f\uff0c]\d{3})+(?!\d)|\d+")


def is_mostly(text: str, script: str) -> bool:
    """Returns whether at least half of a text's letters, in UTF-8 bytes, are of a script.

    Letters are weighted by their size in UTF-8, because one Chinese character carries as much
    information as several Latin letters. The result is True for a text without letters and for the
    script "any".
    """
    if script == ANY_SCRIPT:
        return True
    block_edges = [edge for first, last in SCRIPTS[script] for edge in (first, last + 1)]
    num_bytes = num_inside = 0
    for character in text:
        if character.isalpha():
            letter = ord(character)
            weight = 1 if letter < 0x80 else 2 if letter < 0x800 else 3
            num_bytes += weight
            num_inside += weight * (bisect_right(block_edges, letter) % 2)
    return 2 * num_inside >= num_bytes


def numbers_of(text: str) -> frozenset[int]:
    """Returns the numbers of at least two digits in a text, in digits of any script.

    Numbers of one digit are left out, because translations often spell them out. Thousands may be
    separated, and the parts of a decimal, date or time are numbers of their own.
    """
    found = set()
    for match in _NUMBER.finditer(text):
        digits = "".join(
            str(unicodedata.digit(character)) for character in match[0] if character.isdigit()
        )
        # `int` refuses very long texts; the last digits are enough to tell numbers apart.
        number = int(digits[-1000:])
        if number >= 10:
            found.add(number)
    return frozenset(found)


def punctuation_share(text: str) -> float:
    """Returns the share of punctuation and symbols in a text's characters except spaces, 0 to 1."""
    num_characters = num_marks = 0
    for character in text:
        if not character.isspace():
            num_characters += 1
            num_marks += not character.isalnum() and unicodedata.category(character)[0] in "PS"
    return num_marks / max(num_characters, 1)

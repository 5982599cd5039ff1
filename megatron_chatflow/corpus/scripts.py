"""Which writing system a text is in, for filters.

In: text and the name of a script. Out: whether its letters are mostly of that script.
"""

from bisect import bisect_right

# Unicode blocks whose letters belong to each script: first and last code point.
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


def is_mostly(text: str, script: str) -> bool:
    """Whether letters of a script make up at least half of a text's letters, in UTF-8 bytes.

    In bytes, since a character of Chinese says as much as several Latin letters.

    Args:
        text: The text; one without letters is of every script.
        script: A key of `SCRIPTS`, or "any".
    """
    if script == ANY_SCRIPT:
        return True
    borders = [border for first, last in SCRIPTS[script] for border in (first, last + 1)]
    num_bytes = num_inside = 0
    for character in text:
        if character.isalpha():
            letter = ord(character)
            weight = 1 if letter < 0x80 else 2 if letter < 0x800 else 3
            num_bytes += weight
            num_inside += weight * (bisect_right(borders, letter) % 2)
    return 2 * num_inside >= num_bytes

"""Generates documents that are hard to tokenize: fragments of real text mixed with edge cases.

`fuzz_documents` yields the same documents for the same texts and seed. `careless_lines` writes them
as JSON lines in the way a careless program would.
"""

import json
import random
import string
from collections.abc import Iterator, Sequence

CONTROL = ["<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "<<SYS>>", "<0x0A>", "<0x41>"]
CONTROL += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<mask>"]
SPACES = [" ", "  ", " " * 17, "\t", "\t\t ", "\n", "\r\n", "\n\n\n", "\u00a0", "\u3000", "\u200b"]
HARD = [
    "\u2581",
    "\u2581\u2581 \u2581",
    "\x00",
    "\x00\x01\x7f",
    "\ufffd",
    "\ufeff",
    "\u202eabc\u202c",
]
HARD += ["e\u0301", "\u1100\u1161", "\uffff", "\ue000\uf8ff", "\U000e0fff", "\U0010ffff", "\u0378"]
EMOJI = [
    "\U0001f9ff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44d\U0001f3ff",
    "\u2764\ufe0f",
]
SCRIPTS = [(0x0400, 0x52F), (0x0590, 0x6FF), (0x0900, 0x97F), (0x0E00, 0xE5B), (0x0F00, 0xFDA)]
SCRIPTS += [
    (0x1200, 0x139F),
    (0x16A0, 0x16F8),
    (0x3040, 0x30FF),
    (0xAC00, 0xD7A3),
    (0x4E00, 0x9FFF),
]
SCRIPTS += [(0x12000, 0x12399), (0x1D400, 0x1D7FF), (0x20000, 0x2A6DF), (0xE000, 0xF8FF)]
WORD_LETTERS = [string.ascii_lowercase, string.hexdigits, "a", "ab", string.digits, "-=_*#/\\"]


def fuzz_documents(texts: Sequence[str], num_documents: int, seed: int) -> Iterator[str]:
    """Yields documents. One in 50 is empty or blank, one in 200 is a very long word."""
    generator = random.Random(seed)
    for number in range(num_documents):
        if number % 50 == 0:
            yield generator.choice(["", "", " ", "\n", "\u3000"])
        elif number % 200 == 1:
            letters = generator.choice([*WORD_LETTERS, "\u4e00\u4e25\u4e4a", "\u0e01\u0e32"])
            yield "".join(generator.choices(letters, k=generator.randint(500, 5000)))
        elif number % 4 == 0:
            yield "".join(_part(generator) for _ in range(generator.randint(1, 12)))
        else:
            yield _real(generator, texts)


def _real(generator: random.Random, texts: Sequence[str]) -> str:
    text = generator.choice(texts)
    begin = generator.randrange(len(text))
    text = text[begin : begin + generator.randint(1, 400)]
    for _ in range(generator.choice([0, 0, 1, 2, 5])):
        at = generator.randrange(len(text) + 1)
        text = text[:at] + _part(generator) + text[at:]
    return text


def _part(generator: random.Random) -> str:
    kind = generator.randrange(7)
    if kind == 0:
        return generator.choice(CONTROL)
    if kind == 1:
        return generator.choice(SPACES) * generator.randint(1, 4)
    if kind == 2:
        return generator.choice(HARD)
    if kind == 3:
        return generator.choice(EMOJI) * generator.randint(1, 3)
    if kind == 4:
        begin, end = generator.choice(SCRIPTS)
        return "".join(chr(generator.randint(begin, end)) for _ in range(generator.randint(1, 20)))
    if kind == 5:
        letters = generator.choice(WORD_LETTERS)
        return "".join(generator.choices(letters, k=generator.randint(1, 90)))
    code = generator.randrange(0x110000)
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def careless_lines(documents: Sequence[str], seed: int) -> tuple[list[bytes], int]:
    """Returns the documents as JSON lines, and the number of lines that are not valid UTF-8.

    Some lines are written in ASCII. Some have members before and after the text. Some of the lines
    that are not in ASCII contain a byte that belongs to no character.
    """
    generator = random.Random(seed)
    lines, num_bad = [], 0
    for document in documents:
        record = {"text": document}
        if generator.random() < 0.3:
            record = {"meta": {"n": [1, 2.5e3, None, "<s>"]}, "text": document, "url": '\\"x'}
        line = json.dumps(record, ensure_ascii=generator.random() < 0.5).encode()
        if generator.random() < 0.05 and document:
            at = line.index(b'"text": "') + len(b'"text": "')
            line = (
                line[:at]
                + generator.choice([b"\xff", b"\xc3", b"\xe4\xb8", b"\xc0\x80"])
                + line[at:]
            )
            num_bad += 1
        lines.append(line)
    return lines, num_bad

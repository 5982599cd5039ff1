"""Generates text free of third-party material: invented words and random Chinese characters."""

import random

HAN = [chr(0x4E00 + 37 * k) for k in range(60)]


def made_up_sentences(num_sentences: int, seed: int = 0) -> list[str]:
    """Returns sentences of invented words, every third one of Chinese characters.

    Equal seeds give equal sentences.
    """
    generator = random.Random(seed)
    syllables = [c + v + e for c in "bdfklmnprst" for v in "aeiou" for e in ("", "n", "s")]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(200)]
    sentences = []
    for k in range(num_sentences):
        num_words = generator.randint(3, 12)
        if k % 3 == 2:
            sentences.append("".join(generator.choices(HAN, k=2 * num_words)) + "。")
        else:
            sentences.append(" ".join(generator.choices(words, k=num_words)).capitalize() + ".")
    return sentences

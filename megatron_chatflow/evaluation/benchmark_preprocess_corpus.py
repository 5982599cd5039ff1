"""Text of a given size for the preprocessing benchmark, out of a smaller corpus's sentences.

In: a corpus as JSON lines, a size, a seed. Out: a file of JSON lines, the same for the same seed,
in which no document occurs twice.

What recombination keeps: sentences, and the distribution of documents' lengths in sentences. What
it changes: a sentence comes back size/corpus times, in other company, and words that a larger real
corpus would bring are missing. Encoders that remember words see fewer new ones than in text that
large; `num_distinct_words` says how many there are, and the benchmark measures the corpus as it
stands, where every sentence is new, beside it.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from megatron_chatflow.errors import UserError

# A sentence runs to its mark, with the quotes and blanks behind it, or to the line's end.
_SENTENCE = re.compile(r".+?(?:[。！？；]+[”』」）]*\n*|[.!?]+[\"')\]]*\s+|\n+|\Z)|\n+", re.DOTALL)
_WORD = re.compile(r"\w+")
_BATCH = 1 << 12


@dataclass(frozen=True)
class MadeCorpus:
    """A file of JSON lines.

    Attributes:
        path: The file.
        num_documents: Lines.
        num_text_bytes: UTF-8 bytes of the documents, without JSON.
        num_distinct_words: Different words; of Chinese, different stretches between marks.
        num_distinct_sentences: Different sentences.
    """

    path: Path
    num_documents: int
    num_text_bytes: int
    num_distinct_words: int
    num_distinct_sentences: int


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; joined they are the text."""
    return _SENTENCE.findall(text)


def read_texts(path: Path, key: str = "text") -> list[str]:
    """The documents of a file of JSON lines.

    Raises:
        UserError: It cannot be read, or a line has no such text.
    """
    try:
        lines = path.read_bytes().splitlines()
        texts = [orjson.loads(line)[key] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read corpus: {path}: {error}: give --corpus, or make the demo's "
            "with tools/fetch_demo_corpus.py"
        ) from error
    if not any(texts):
        raise UserError(f"no text in corpus: {path}: name another file with --corpus")
    return [text for text in texts if text]


def write_as_it_is(texts: list[str], path: Path) -> MadeCorpus:
    """Writes documents as they stand, the first of equal ones."""
    return _write(list(dict.fromkeys(texts)), path, _facts(texts))


def write_recombined(texts: list[str], path: Path, num_bytes: int, seed: int) -> MadeCorpus:
    """Writes documents of sentences drawn from all of a corpus's, until there are enough.

    Args:
        texts: The corpus.
        path: The file.
        num_bytes: Of text, at least.
        seed: Of the draws.
    """
    return _write(_recombined(texts, num_bytes, seed), path, _facts(texts))


def _recombined(texts: list[str], num_bytes: int, seed: int) -> Iterator[str]:
    random = np.random.default_rng(seed)
    lengths = np.array([len(split_sentences(text)) for text in texts])
    sentences = list(dict.fromkeys(s for text in texts for s in split_sentences(text)))
    seen: set[bytes] = set()
    num_made = 0
    while num_made < num_bytes:
        for length in random.choice(lengths, _BATCH):
            drawn = random.integers(len(sentences), size=max(length, 2))
            text = "".join([sentences[k] for k in drawn.tolist()])
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
            num_made += len(text.encode())
            yield text
            if num_made >= num_bytes:
                return


def _facts(texts: list[str]) -> tuple[int, int]:
    """How many different words and sentences there are to draw from."""
    words: set[str] = set()
    sentences: set[str] = set()
    for text in texts:
        words.update(_WORD.findall(text))
        sentences.update(split_sentences(text))
    return len(words), len(sentences)


def _write(texts: Iterator[str] | list[str], path: Path, facts: tuple[int, int]) -> MadeCorpus:
    num_documents = num_text_bytes = 0
    with path.open("wb") as file:
        for text in texts:
            file.write(orjson.dumps({"text": text}) + b"\n")
            num_documents += 1
            num_text_bytes += len(text.encode())
    return MadeCorpus(path, num_documents, num_text_bytes, *facts)

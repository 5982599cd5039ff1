"""Makes the corpora that benchmarks read: datasets of random token ids, and text of a given size.

Text of a given size consists of documents that recombine the sentences of a smaller corpus. No
document occurs twice, and equal seeds give equal files. Recombination keeps the sentences and the
distribution of document lengths in sentences. It repeats each sentence about size / corpus size
times and adds none of the new words that a larger real corpus would have, so an encoder that caches
words has fewer misses than on real text of that size. `GeneratedCorpus` reports the number of
distinct words, and the preprocessing benchmark also measures the corpus as it is.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from megatron_chatflow.data.indexed import HEADER, MAGIC, IndexedDatasetWriter, bin_path, idx_path
from megatron_chatflow.errors import UserError

VOCAB_SIZE = 32_000  # vocabulary of the datasets of random ids

# A sentence ends with its punctuation mark and the quotes and blanks after it, or with the line.
_SENTENCE = re.compile(r".+?(?:[。！？；]+[”』」）]*\n*|[.!?]+[\"')\]]*\s+|\n+|\Z)|\n+", re.DOTALL)
_WORD = re.compile(r"\w+")
_BATCH = 1 << 12


@dataclass(frozen=True)
class GeneratedCorpus:
    """A file of JSON lines.

    Attributes:
        path: Path of the file.
        num_documents: Number of lines.
        num_text_bytes: UTF-8 bytes of the documents, without JSON.
        num_distinct_words: Distinct words; in Chinese, distinct spans between punctuation marks.
        num_distinct_sentences: Distinct sentences.
    """

    path: Path
    num_documents: int
    num_text_bytes: int
    num_distinct_words: int
    num_distinct_sentences: int


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences. Their concatenation is the text."""
    return _SENTENCE.findall(text)


def read_texts(path: Path, key: str = "text") -> list[str]:
    """Reads the documents of a file of JSON lines.

    Raises:
        UserError: The file cannot be read, or a line has no such key.
    """
    try:
        lines = path.read_bytes().splitlines()
        texts = [orjson.loads(line)[key] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); set --corpus, or create the demo corpus with "
            "tools/fetch_demo_corpus.py"
        ) from error
    if not any(texts):
        raise UserError(f"{path}: contains no text; set another corpus with --corpus")
    return [text for text in texts if text]


def write_distinct(texts: list[str], path: Path) -> GeneratedCorpus:
    """Writes the documents without repetitions."""
    return _write(list(dict.fromkeys(texts)), path, _facts(texts))


def write_recombined(texts: list[str], path: Path, num_bytes: int, seed: int) -> GeneratedCorpus:
    """Writes documents of sentences drawn from all documents, up to a number of bytes.

    Args:
        texts: Documents of the corpus.
        path: Path of the file.
        num_bytes: Minimum number of bytes of text.
        seed: Seed of the draws.
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
    """Counts the distinct words and sentences of the texts."""
    words: set[str] = set()
    sentences: set[str] = set()
    for text in texts:
        words.update(_WORD.findall(text))
        sentences.update(split_sentences(text))
    return len(words), len(sentences)


def _write(texts: Iterator[str] | list[str], path: Path, facts: tuple[int, int]) -> GeneratedCorpus:
    num_documents = num_text_bytes = 0
    with path.open("wb") as file:
        for text in texts:
            file.write(orjson.dumps({"text": text}) + b"\n")
            num_documents += 1
            num_text_bytes += len(text.encode())
    return GeneratedCorpus(path, num_documents, num_text_bytes, *facts)


@dataclass
class BenchmarkVocabulary:
    """Replaces a tokenizer where ids are only copied."""

    vocab_size: int = VOCAB_SIZE
    pad_id: int = 0
    fingerprint: str = ""


def write_corpus(prefix: Path, num_tokens: int, vocab_size: int = VOCAB_SIZE) -> None:
    """Writes random ids in documents of lognormal length, about 660 tokens."""
    random = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    while writer.num_tokens < num_tokens:
        lengths = random.lognormal(6.0, 1.0, 4096).astype(np.int32).clip(1, 1 << 15)
        # Id 0 is the peer's end of a document, so it ends ours too.
        ids = random.integers(1, vocab_size, int(lengths.sum()), dtype=np.uint16)
        ids[np.cumsum(lengths) - 1] = 0
        writer.add_documents(ids, lengths)
    writer.finalize()


def write_sparse_corpus(prefix: Path, num_tokens: int) -> None:
    """Writes a sparse dataset of up to 2**20 documents of zeros, which takes no disk space.

    Raises:
        UserError: The file system does not support files of that size.
    """
    num_documents = min(num_tokens, 1 << 20)
    ends = np.linspace(0, num_tokens, num_documents + 1).astype(np.int64)
    uint16_code = 8
    try:
        with idx_path(prefix).open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, uint16_code, num_documents, num_documents + 1))
            file.write(np.diff(ends).astype("<i4").tobytes())
            file.write((2 * ends[:-1]).astype("<i8").tobytes())
            file.write(np.arange(num_documents + 1, dtype="<i8").tobytes())
        with bin_path(prefix).open("wb") as file:
            file.truncate(2 * num_tokens)
    except OSError as error:
        raise UserError(f"{prefix}: cannot create a sparse file ({error.strerror})") from error

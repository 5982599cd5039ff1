"""Finds the texts of evaluation files in the documents of a corpus.

Texts are compared as words in lower case without punctuation marks, and scripts without spaces as
characters. A document is contaminated if it contains a run of `num_words` words of a text, or a
whole text. Texts with fewer than `MIN_WORDS` words, or `num_words` without whole texts, are not
searched, because they occur anywhere.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.cleaning.texts import normalized_words_of
from megatron_chatflow.preprocess.parse import parse_records
from megatron_chatflow.preprocess.readers import find_inputs, read_chunks
from megatron_chatflow.preprocess.settings import CorpusSettings

MIN_WORDS = 8
Match = Literal["ngram", "exact"]


@dataclass(frozen=True)
class Contamination:
    """A text of an evaluation file that was found in a document."""

    file: str  # name of the evaluation file
    record: int  # number of its record or line, counted from 1
    words: str  # the words that were found, separated by spaces


class EvaluationIndex:
    """An index of the texts of evaluation files.

    Attributes:
        num_texts: Number of indexed texts.
        min_words: Number of words of the shortest texts that are indexed.
        num_short: Number of texts with fewer words, which are not indexed.
    """

    def __init__(self, num_words: int, match: Sequence[Match] = ("ngram", "exact")) -> None:
        """Initializes an empty index.

        Args:
            num_words: Number of words of an n-gram, at least `MIN_WORDS`.
            match: "ngram" finds each n-gram of a text, "exact" finds whole texts.
        """
        self.num_words = num_words
        self.match = tuple(match)
        self.min_words = MIN_WORDS if "exact" in self.match else num_words
        self.num_texts = self.num_short = 0
        # Runs of words by their first `MIN_WORDS` words, with the file and the record.
        self._runs: defaultdict[str, dict[str, tuple[str, int]]] = defaultdict(dict)

    def add(self, text: str, file: str, record: int) -> None:
        """Adds a text of an evaluation file."""
        words = normalized_words_of(text)
        if len(words) < self.min_words:
            self.num_short += bool(words)
            return
        self.num_texts += 1
        runs = [words]
        if "ngram" in self.match and len(words) >= self.num_words:
            count = len(words) - self.num_words + 1
            runs = [words[k : k + self.num_words] for k in range(count)]
        for run in runs:
            first = " ".join(run[:MIN_WORDS])
            self._runs[first].setdefault(" ".join(run), (file, record))

    def find(self, text: str) -> Contamination | None:
        """Returns the first indexed run of words in a document; None without one."""
        words = normalized_words_of(text)
        for k in range(len(words) - MIN_WORDS + 1):
            runs = self._runs.get(" ".join(words[k : k + MIN_WORDS]))
            for run, (file, record) in runs.items() if runs else ():
                num_words = run.count(" ") + 1
                if " ".join(words[k : k + num_words]) == run:
                    return Contamination(file, record, run)
        return None


def read_evaluation_files(
    inputs: Sequence[str], num_words: int, match: Sequence[Match] = ("ngram", "exact")
) -> EvaluationIndex:
    """Indexes every text in the records of evaluation files, also in nested lists and objects.

    Raises:
        UserError: A file or one of its records cannot be read, or no text is long enough.
    """
    index = EvaluationIndex(num_words, match)
    settings = CorpusSettings(txt_documents="line", all_columns=True)
    for file in find_inputs(inputs):
        for chunk in read_chunks(file, settings):
            result = parse_records(chunk, settings, needs_text=False)
            if result.parsed.first_bad is not None:
                raise UserError(
                    f"--decontaminate: {result.parsed.first_bad}: correct it, because its text "
                    "would not be found"
                )
            for number, record in result.records:
                for text in _texts_of(record):
                    index.add(text, file.name, number)
    if not index.num_texts:
        raise UserError(
            f"--decontaminate {' '.join(inputs)}: none of {index.num_short} texts has "
            f"{index.min_words} words: check the files, --decontaminate-match and "
            "--decontaminate-ngram"
        )
    return index


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_of(item)

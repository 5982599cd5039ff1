"""datatrove pipeline steps: reading and writing corpora, and the filters of `texts`.

This module imports datatrove. Every filter counts the documents that it drops by reason, and every
step runs on one input file per task, so that the output depends on the files only and not on the
number of workers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from megatron_chatflow.preprocess.cleaning.decontaminate import EvaluationIndex
from megatron_chatflow.preprocess.cleaning.texts import (
    chinese_converter,
    language_identifier,
    limit_punctuation,
    sentence_spans_of,
    without_boilerplate,
    words_of,
)
from megatron_chatflow.preprocess.pair_filters import is_mostly
from megatron_chatflow.preprocess.parse import parse_records
from megatron_chatflow.preprocess.readers import InputFile, read_chunks
from megatron_chatflow.preprocess.records import value_at, with_value_at
from megatron_chatflow.preprocess.settings import CorpusSettings

Documents = Iterator[Document]
FILE_NAME = "${rank}.jsonl.zst"
BAD_LINE = "bad line"  # the prefix of the counts of records that are not documents

# Chinese readers' common function words, as Gopher's English stop words.
_CHINESE_STOP_WORDS = ["的", "了", "是", "在", "和", "有", "不", "这", "也", "與", "這"]


class Words(WordTokenizer):  # type: ignore[misc]
    """Splits texts as `words_of` does, for datatrove's filters. It needs no model."""

    def word_tokenize(self, text: str) -> list[str]:
        """Returns the words of a text."""
        return words_of(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Returns the sentences of a text."""
        return [text[begin:end].strip() for begin, end in sentence_spans_of(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Returns begin and end of each sentence."""
        return sentence_spans_of(text)


WORDS = Words()


class ReadCorpus(PipelineStep):  # type: ignore[misc]
    """Reads the documents of one input file per task, in any format that preprocessing reads.

    A document's metadata has its record. Records that are not documents are counted by reason.
    """

    type = "READER"
    name = "corpus"

    def __init__(self, files: Sequence[InputFile], settings: CorpusSettings) -> None:
        super().__init__()
        self.files = list(files)
        self.settings = replace(settings, all_columns=True)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yields the documents of the task's file."""
        file = self.files[rank]
        (key,) = self.settings.json_keys
        first_bad: str | None = None
        for chunk in read_chunks(file, self.settings):
            result = parse_records(chunk, self.settings)
            for reason, count in result.parsed.bad_lines.items():
                self.stat_update(f"{BAD_LINE}: {reason}", value=count)
            if first_bad is None and result.parsed.first_bad is not None:
                first_bad = result.parsed.first_bad
                self.stat_update(f"first {BAD_LINE}: {first_bad}")
            texts = result.parsed.documents[key]
            for (number, record), text in zip(result.records, texts, strict=True):
                self.stat_update("total")
                yield Document(text, f"{file.name}:{number}", metadata={"record": record})


class ReadStage(PipelineStep):  # type: ignore[misc]
    """Reads the file that the same task of an earlier stage has written, if it wrote one."""

    type = "READER"
    name = "stage"

    def __init__(self, folder: str, key: str) -> None:
        super().__init__()
        self.folder = folder
        self.key = key

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yields the documents in the order in which they were written."""
        path = Path(self.folder) / FILE_NAME.replace("${rank}", f"{rank:05d}")
        if not path.exists():
            return
        with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines):
                record = orjson.loads(line)
                text = value_at(record, self.key)
                yield Document(text, str(number), metadata={"record": record})


class WriteRecords(JsonlWriter):  # type: ignore[misc]
    """Writes the records of documents as JSON lines, with the new text in place of the old one."""

    def __init__(self, folder: str, key: str, name: str = FILE_NAME, *, why: bool = False) -> None:
        self.key = key
        self.why = why
        super().__init__(folder, output_filename=name, compression="zstd", adapter=_record_of)

    def _write(self, document: dict[str, Any], file_handler: IO[bytes], _filename: str) -> None:
        options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
        file_handler.write(orjson.dumps(document, default=str, option=options))


def _record_of(writer: WriteRecords, document: Document) -> dict[str, Any]:
    if "record" not in document.metadata:  # of a removed part of a document
        return {"where": document.id, **document.metadata}
    record = with_value_at(document.metadata["record"], writer.key, document.text)
    if writer.why:
        facts = {name: v for name, v in document.metadata.items() if name != "record"}
        return {"where": document.id, **facts, "record": record}
    return record


class _Change(PipelineStep):  # type: ignore[misc]
    """Applies a function to the text of every document and drops documents without any text left.

    Subclasses are created in the process that submits the job and pickled.
    """

    type = "FORMAT"

    def change(self, text: str) -> str:
        """Returns the new text."""
        raise NotImplementedError

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """Yields the documents with their new texts."""
        for document in data:
            if self.replace_text(document, self.change(document.text)):
                yield document

    def replace_text(self, document: Document, text: str) -> bool:
        """Counts the change of a document; returns whether there is any text left."""
        if text != document.text:
            self.stat_update("changed")
            document.text = text
        if not text.strip():
            self.stat_update("dropped", "dropped_no text left")
            return False
        return True


class ConvertChinese(_Change):
    """Converts Chinese text to the simplified or the traditional script."""

    name = "chinese"

    def __init__(self, script: Literal["simplified", "traditional"]) -> None:
        super().__init__()
        self.script = script

    def change(self, text: str) -> str:
        """Returns the converted text."""
        return chinese_converter(self.script)(text)


class LimitPunctuation(_Change):
    """Shortens runs of one punctuation mark."""

    name = "punctuation"

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def change(self, text: str) -> str:
        """Returns the text with runs of at most `limit` marks."""
        return limit_punctuation(text, self.limit)


class RemoveBoilerplate(_Change):
    """Removes lines of navigation, notices and advertisements, and writes them if asked to."""

    name = "boilerplate"

    def __init__(self, removed: WriteRecords | None = None) -> None:
        super().__init__()
        self.removed = removed

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """Yields the documents without these lines, which are counted."""
        with self.removed or nullcontext():
            for document in data:
                text, lines = without_boilerplate(document.text)
                if lines:
                    self.stat_update("lines removed", value=len(lines))
                    if self.removed is not None:
                        part = Document("\n".join(lines), document.id, metadata={"lines": lines})
                        self.removed.write(part, rank)
                if self.replace_text(document, text):
                    yield document


class _Filter(BaseFilter):  # type: ignore[misc]
    """A filter whose dropped documents are written with the reason if a folder is given."""

    def __init__(self, removed: WriteRecords | None = None) -> None:
        super().__init__(removed)


class KeepLanguages(_Filter):
    """Keeps documents in some languages; see `language_identifier`."""

    name = "language"

    def __init__(
        self, languages: Sequence[str], threshold: float, removed: WriteRecords | None = None
    ) -> None:
        super().__init__(removed)
        self.languages = frozenset(languages)
        self.threshold = threshold

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Returns whether a document is in one of the languages, or False and the reason."""
        language, probability = language_identifier()(doc.text)
        doc.metadata |= {"language": language, "language_probability": round(probability, 4)}
        if language not in self.languages:
            return False, language
        return True if probability >= self.threshold else (False, f"uncertain {language}")


class ByScript(_Filter):
    """Applies one of two filters: one for texts that are mostly Chinese, one for all others.

    The limits of datatrove's filters are made for words between spaces.
    """

    def __init__(
        self,
        name: str,
        chinese: BaseFilter,
        others: BaseFilter,
        removed: WriteRecords | None = None,
    ) -> None:
        self.name = name
        super().__init__(removed)
        self.chinese = chinese
        self.others = others

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Returns the result of the filter for the document's script."""
        chosen = self.chinese if is_mostly(doc.text, "han") else self.others
        if not words_of(doc.text):
            return False, "no words"
        result: bool | tuple[bool, str] = chosen.filter(doc)
        return result


class Decontaminate(_Filter):
    """Drops documents that contain texts of evaluation files."""

    name = "decontamination"

    def __init__(self, index: EvaluationIndex, removed: WriteRecords | None = None) -> None:
        super().__init__(removed)
        self.index = index

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Returns True, or False and the name of the evaluation file."""
        found = self.index.find(doc.text)
        if found is None:
            return True
        doc.metadata["contamination"] = {
            "file": found.file,
            "record": found.record,
            "words": found.words,
        }
        return False, found.file


def _gopher_quality() -> tuple[BaseFilter, BaseFilter]:
    chinese = GopherQualityFilter(
        min_doc_words=80,  # characters
        max_doc_words=200_000,
        min_avg_word_length=None,
        max_avg_word_length=None,
        max_non_alpha_words_ratio=0.7,
        stop_words=_CHINESE_STOP_WORDS,
        language=WORDS,
    )
    return chinese, GopherQualityFilter(language=WORDS)


def _gopher_repetition() -> tuple[BaseFilter, BaseFilter]:
    # An n-gram of words has about twice as many characters. The shares of the most frequent n-gram
    # count the n - 1 spaces between its n characters.
    chinese = GopherRepetitionFilter(
        top_n_grams=((4, 0.35), (6, 0.33), (8, 0.3)),
        dup_n_grams=((10, 0.15), (12, 0.14), (14, 0.13), (16, 0.12), (18, 0.11), (20, 0.10)),
        language=WORDS,
    )
    return chinese, GopherRepetitionFilter(language=WORDS)


def _c4() -> tuple[BaseFilter, BaseFilter]:
    # C4's rules on words in a line and on its last character are for English.
    chinese = C4QualityFilter(
        filter_no_terminal_punct=False, min_words_per_line=-1, max_word_length=-1, language=WORDS
    )
    return chinese, C4QualityFilter(language=WORDS)


def _fineweb() -> tuple[BaseFilter, BaseFilter]:
    chinese = FineWebQualityFilter(short_line_length=12, new_line_ratio=0.1, language=WORDS)
    return chinese, FineWebQualityFilter(language=WORDS)


def minhash_config(num_words: int, num_buckets: int, num_hashes: int) -> MinhashConfig:
    """Returns datatrove's configuration of MinHash.

    The n-grams are hashed by SHA-1, because datatrove does not support version 4 of xxhash.
    """
    return MinhashConfig(
        n_grams=num_words,
        num_buckets=num_buckets,
        hashes_per_bucket=num_hashes,
        hash_config=HashConfig(hash_fc="sha1"),
    )


QUALITY_FILTERS: Mapping[str, Callable[[], tuple[BaseFilter, BaseFilter]]] = {
    "gopher-quality": _gopher_quality,
    "gopher-repetition": _gopher_repetition,
    "c4": _c4,
    "fineweb": _fineweb,
}
"""The quality filters, as pairs of one for Chinese and one for other texts."""

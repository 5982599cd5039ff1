"""The settings of a preprocessing job. Every worker receives all of them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from megatron_chatflow.preprocess.dropped import DEFAULT_MAX_SHARE
from megatron_chatflow.preprocess.pairs import PairSettings, read_pair_templates
from megatron_chatflow.preprocess.parse import CorpusSettings
from megatron_chatflow.preprocess.readers import MAX_RECORD_BYTES
from megatron_chatflow.tokenizer.chat_template import read_chat_template
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding


@dataclass(frozen=True)
class PreprocessSettings:
    """Settings of a preprocessing job.

    Attributes:
        inputs: Files, globs, folders, or `-` for standard input.
        output_prefix: Path prefix of all outputs.
        tokenizer_model: File or folder of the tokenizer.
        tokenizer_type: One of `TOKENIZER_TYPES`, or "auto".
        corpus: Settings for reading and parsing the inputs.
        append_bos: Whether every document begins with the beginning-of-sequence token.
        append_eod: Whether every document ends with the end-of-document token.
        max_tokens: Maximum number of tokens in a document of pairs or chats; None for no limit.
        over_long: Whether to cut a longer document at the end of a turn ("truncate") or to drop it
            ("drop").
        num_workers: Number of threads or processes that tokenize. With 1, the calling thread does.
        max_bad_lines: Maximum number of bad lines in all partitions of the job. They are dropped;
            with more of them, the job fails.
        max_dropped_share: Maximum share of records, from 0 to 1, that may be dropped for any reason
            in all partitions of the job before it fails.
        dedup: Whether to keep only the first of several documents with the same text.
        overwrite: Whether to replace existing outputs.
        num_partitions: Number of partitions that are built in sequence and then merged. A killed
            job continues after the last finished partition.
        shard: Index and count of the only partition to build, for job arrays.
        ray: Address of a Ray cluster that builds the partitions; None for this machine.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_model: str
    tokenizer_type: str = "auto"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    append_bos: bool = False
    append_eod: bool = False
    max_tokens: int | None = None
    over_long: Literal["truncate", "drop"] = "truncate"
    num_workers: int = 1
    max_bad_lines: int = 100
    max_dropped_share: float = DEFAULT_MAX_SHARE
    dedup: bool = False
    overwrite: bool = False
    num_partitions: int = 1
    shard: tuple[int, int] | None = None
    ray: str | None = None

    def record(self) -> dict[str, Any]:
        """Returns the settings that affect the outputs, as they are recorded in the sidecar."""
        corpus = asdict(self.corpus)
        if self.corpus.format != "pairs":
            del corpus["pairs"]
        elif self.corpus.pairs.columns is None:
            del corpus["pairs"]["columns"]
        del corpus["chat_template"]
        if self.corpus.encoding == "utf-8":
            del corpus["encoding"]  # as in sidecars of versions without this setting
        if self.corpus.max_record_bytes == MAX_RECORD_BYTES:
            del corpus["max_record_bytes"]
        del corpus["max_expansion"]  # it can only make the job fail
        if self.corpus.format == "text":
            del corpus["template"], corpus["loss"]
        elif self.corpus.chat_template is not None:
            source = self.corpus.chat_template.source.encode()
            corpus["template"] = f"{self.corpus.chat_name} {hashlib.sha256(source).hexdigest()}"
        limit = {} if self.max_tokens is None else {"over_long": self.over_long}
        options = {
            "append_bos": self.append_bos,
            "append_eod": self.append_eod,
            "max_tokens": self.max_tokens,
            **limit,
            "dedup": self.dedup,
        }
        recorded: dict[str, Any] = json.loads(json.dumps({**corpus, **options}))
        return recorded


def settings_of_options(options: Mapping[str, Any]) -> PreprocessSettings:
    """Builds the settings from command-line options.

    Args:
        options: Values by name. The names are the fields of `PreprocessSettings` and
            `CorpusSettings`, and those of `PairSettings` with the prefix `pair_`. Missing options
            have their defaults.

    Raises:
        UserError: A template file cannot be read, or the encoding is unknown.
    """
    given = dict(options)
    if given.get("num_workers") is None:
        # A job on a cluster has many partitions, so one process for each is enough by default.
        given["num_workers"] = 1 if given.get("ray") else len(os.sched_getaffinity(0))
    if given.get("encoding") is not None:
        given["encoding"] = canonical_encoding(given["encoding"])
    if given.get("chat_template") is not None:
        given["chat_template"] = read_chat_template(given["chat_template"])
    default_key = "messages" if given.get("format") == "chat" else "text"
    given["json_keys"] = given.get("json_keys") or [default_key]
    if given.get("pair_template", "plain") not in ("plain", "translate"):
        given["pair_texts"] = read_pair_templates(given["pair_template"])
    given["pairs"] = _build(PairSettings, given, "pair_")
    given["corpus"] = _build(CorpusSettings, given)
    settings: PreprocessSettings = _build(PreprocessSettings, given)
    return settings


def _build(settings_type: type, given: Mapping[str, Any], prefix: str = "") -> Any:
    names = [field.name for field in fields(settings_type) if prefix + field.name in given]
    values = {name: given[prefix + name] for name in names}
    return settings_type(**{k: tuple(v) if type(v) is list else v for k, v in values.items()})

"""The settings of a corpus and of a preprocessing job. Every worker receives all of them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.chats import ChatSettings
from megatron_chatflow.preprocess.dedup import num_hashes_of
from megatron_chatflow.preprocess.dropped import DEFAULT_MAX_SHARE
from megatron_chatflow.preprocess.pairs import PairSettings, read_pair_templates
from megatron_chatflow.preprocess.tab_separated import TabOptions
from megatron_chatflow.preprocess.templates import FAMILY_TEMPLATES
from megatron_chatflow.tokenizer.chat_template import (
    JinjaTemplate,
    read_chat_template,
    template_variables,
)
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding

CorpusFormat = Literal["text", "pairs", "chat"]
TxtDocuments = Literal["file", "line"]
# Maximum size of a record: a line, a row, or a text file that is one document.
MAX_RECORD_BYTES = 1 << 26
# Maximum ratio of a compressed file's content to its size. Text expands less than a hundredfold.
MAX_EXPANSION = 1000.0


@dataclass(frozen=True)
class CorpusSettings:
    """Settings for reading and parsing a corpus."""

    format: CorpusFormat = "text"  # "text", "pairs" or "chat"
    # The output keys. For text, they are also the JSON keys of the texts; for chats, the key is
    # also the JSON key of the messages.
    json_keys: tuple[str, ...] = ("text",)
    # whether a `.txt` file is one document ("file") or has one document per line ("line")
    txt_documents: TxtDocuments = "file"
    # whether to drop lines that are not UTF-8 or to replace invalid bytes
    invalid_utf8: Literal["drop", "replace"] = "drop"
    encoding: str = "utf-8"  # the encoding of the input text, as returned by `canonical_encoding`
    # Maximum size of a record in bytes. A larger record is a bad line.
    max_record_bytes: int = MAX_RECORD_BYTES
    # maximum ratio of a compressed file's content to its size; 0 for no limit
    max_expansion: float = MAX_EXPANSION
    # name of a built-in chat template for chats and translation instructions
    template: str = "chatflow"
    # The Jinja template to use instead of `template`: the user's, or one of `FAMILY_TEMPLATES`
    chat_template: JinjaTemplate | None = None
    # "response" for loss on responses only, "all" for loss on every token
    loss: Literal["response", "all"] = "response"
    all_columns: bool = False  # whether text is read with all other columns of its table
    pairs: PairSettings = field(default_factory=PairSettings)  # settings for pairs
    chats: ChatSettings = field(default_factory=ChatSettings)  # settings for chats

    @property
    def chat_name(self) -> str:
        """Name of the chat template."""
        return self.template if self.chat_template is None else self.chat_template.name

    @property
    def has_loss_mask(self) -> bool:
        """Whether the documents have a loss mask."""
        return self.format != "text"

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns to read from parquet and Arrow files; None for all."""
        if self.format == "text":
            return None if self.all_columns else self.json_keys
        if self.format == "chat":
            return None
        score = self.pairs.score_name
        return (*self.pairs.keys, "translation", *([] if score is None else [score]))

    @property
    def sides(self) -> tuple[str, str] | None:
        """The languages that the names of aligned files end in; None if records are not pairs."""
        return self.pairs.codes if self.format == "pairs" else None

    @property
    def tabs(self) -> TabOptions | None:
        """Options for tab-separated pairs; None if the records are not pairs."""
        return self.pairs.tabs if self.format == "pairs" else None


@dataclass(frozen=True)
class PreprocessSettings:
    """Settings of a preprocessing job."""

    inputs: tuple[str, ...]  # files, globs, folders, or `-` for standard input
    output_prefix: str  # path prefix of all outputs
    tokenizer_model: str  # file or folder of the tokenizer
    tokenizer_type: str = "auto"  # one of `TOKENIZER_TYPES`, or "auto"
    # settings for reading and parsing the inputs
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    append_bos: bool = False  # whether every document begins with the beginning-of-sequence token
    append_eod: bool = False  # whether every document ends with the end-of-document token
    # maximum number of tokens in a document of pairs or chats; None for no limit
    max_tokens: int | None = None
    # whether to cut a longer document at the end of a turn ("truncate") or to drop it ("drop")
    over_long: Literal["truncate", "drop"] = "truncate"
    # Number of threads or processes that tokenize. With 1, the calling thread does.
    num_workers: int = 1
    # Maximum number of bad lines in all partitions of the job. They are dropped; with more of them,
    # the job fails.
    max_bad_lines: int = 100
    # maximum share of records, from 0 to 1, that may be dropped for any reason in all partitions of
    # the job before it fails
    max_dropped_share: float = DEFAULT_MAX_SHARE
    dedup: bool = False  # whether to keep only the first of several documents with the same text
    overwrite: bool = False  # whether to replace existing outputs
    # Number of partitions that are built in sequence and then merged. A killed job continues after
    # the last finished partition.
    num_partitions: int = 1
    # index and count of the only partition to build, for job arrays
    shard: tuple[int, int] | None = None
    # address of a Ray cluster that builds the partitions; None for this machine
    ray: str | None = None

    @property
    def num_hashes(self) -> int:
        """Number of hashes that identify a document when duplicates are dropped; 0 if they stay."""
        pairs = {"dedup": self.corpus.pairs.dedup} if self.corpus.format == "pairs" else {}
        return num_hashes_of({"dedup": self.dedup, "pairs": pairs})

    def record(self) -> dict[str, Any]:
        """Returns the settings that affect the outputs, as they are recorded in the sidecar."""
        corpus = asdict(self.corpus)
        del corpus["pairs"]
        if self.corpus.format == "pairs":
            corpus["pairs"] = self.corpus.pairs.record()
        # As in sidecars of versions without these settings.
        if self.corpus.format != "chat" or self.corpus.chats == ChatSettings():
            del corpus["chats"]
        del corpus["chat_template"]
        if self.corpus.encoding == "utf-8":
            del corpus["encoding"]  # as in sidecars of versions without this setting
        if self.corpus.max_record_bytes == MAX_RECORD_BYTES:
            del corpus["max_record_bytes"]
        del corpus["all_columns"]  # the texts are the same
        del corpus["max_expansion"]  # it can only make the job fail
        if self.corpus.format == "text":
            del corpus["template"], corpus["loss"]
        elif self.corpus.chat_template is not None:
            source = self.corpus.chat_template.source.encode()
            corpus["template"] = f"{self.corpus.chat_name} {hashlib.sha256(source).hexdigest()}"
            if self.corpus.chat_template.variables:
                corpus["template"] += f" {json.dumps(self.corpus.chat_template.variables)}"
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

    The names of the options are the fields of `PreprocessSettings` and `CorpusSettings`, and those
    of `PairSettings` and `ChatSettings` with the prefixes `pair_` and `chat_`. Missing options have
    their defaults.

    Raises:
        UserError: A template file cannot be read, its variables are not valid, or the encoding is
            unknown.
    """
    given = dict(options)
    if given.get("num_workers") is None:
        # A job on a cluster has many partitions, so one process for each is enough by default.
        given["num_workers"] = 1 if given.get("ray") else len(os.sched_getaffinity(0))
    if given.get("encoding") is not None:
        given["encoding"] = canonical_encoding(given["encoding"])
    if given.get("chat_template") is not None:
        given["chat_template"] = read_chat_template(given["chat_template"])
    elif given.get("template") in FAMILY_TEMPLATES:
        name = given["template"]
        given["chat_template"] = JinjaTemplate(name, FAMILY_TEMPLATES[name])
    if variables := given.get("chat_template_kwargs"):
        if given.get("chat_template") is None:
            raise UserError(
                f"--chat-template-kwargs {variables}: the template {given.get('template')} has no "
                "variables; remove the flag"
            )
        given["chat_template"] = replace(
            given["chat_template"], variables=template_variables(variables)
        )
    default_key = "messages" if given.get("format") == "chat" else "text"
    given["json_keys"] = given.get("json_keys") or [default_key]
    if given.get("pair_template", "plain") not in ("plain", "translate"):
        given["pair_texts"] = read_pair_templates(given["pair_template"])
    given["pairs"] = _build(PairSettings, given, "pair_")
    given["chats"] = _build(ChatSettings, given, "chat_")
    given["corpus"] = _build(CorpusSettings, given)
    settings: PreprocessSettings = _build(PreprocessSettings, given)
    return settings


def _build(settings_type: type, given: Mapping[str, Any], prefix: str = "") -> Any:
    names = [field.name for field in fields(settings_type) if prefix + field.name in given]
    values = {name: given[prefix + name] for name in names}
    return settings_type(**{k: tuple(v) if type(v) is list else v for k, v in values.items()})

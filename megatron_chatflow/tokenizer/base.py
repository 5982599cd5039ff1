"""The `Tokenizer` class and the functions that its implementations share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.tokenizer_json import (
    MAX_MODEL_BYTES,
    is_library_error,
    open_tokenizer_json,
    parse_json,
    parse_tokenizer_json,
    without_panic_output,
)

# Classes of transformers that add BOS to every text by default.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
TOKENIZER_TYPES = ("Llama2Tokenizer", "HuggingFaceTokenizer")


class Tokenizer(ABC):
    """Converts text to token ids and ids to text.

    Attributes:
        tokenizer_type: One of `TOKENIZER_TYPES`.
        model_path: The file that the tokenizer was loaded from.
        vocab_size: Number of ids.
        bos_id: Id of the begin-of-sequence token, or -1 if the model has none.
        eos_id: Id of the end-of-sequence token, which also ends a document.
        pad_id: Id of the padding token, or `eos_id` if the model has none.
        unk_id: Id of the unknown token, or -1 if the model has none.
        fingerprint: SHA-256 of the model file in hexadecimal.
    """

    tokenizer_type: str
    model_path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    fingerprint: str

    @cached_property
    def add_bos_token(self) -> bool:
        """Whether the model's configuration adds BOS to every text (see `adds_bos_token`)."""
        return adds_bos_token(self.model_path, self.bos_id)

    @cached_property
    def prefixes_every_part(self) -> bool:
        """Whether a text that follows a control token begins as a text at the beginning does.

        A SentencePiece model prepends a space to each of them, except if the `tokenizer.json` in
        the same folder does so only at the beginning of the whole text (the scheme ``first`` of
        its pre-tokenizer, as in Mistral 7B v0.3).
        """
        try:
            data = (self.model_path.parent / "tokenizer.json").read_bytes()
            return not prefixes_first_part(parse_tokenizer_json(data))
        except (OSError, ValueError):  # missing, or damaged and not used
            return True

    @cached_property
    @abstractmethod
    def num_bytes_per_id(self) -> npt.NDArray[np.int64]:
        """The number of UTF-8 bytes of text that each id represents, int64[vocab_size].

        It is 0 for control ids and the unknown id.
        """

    def encode(self, text: str) -> list[int]:
        """Encodes a text from its beginning, without BOS or EOS.

        Lone surrogates, which UTF-8 cannot represent, are replaced by U+FFFD.
        """
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_continuation(self, text: str) -> list[int]:
        """Encodes a text that follows other text: like `encode`, but adds no leading space."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes every text as `encode` does."""

    def encode_arrays(
        self, texts: Sequence[str], end_id: int = -1
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Encodes every text as `encode` does and returns the ids as arrays.

        ``end_id`` is appended to the ids of every text that has at least one id, unless it is -1.

        Returns:
            The concatenated ids of all texts, int32[num_ids], and the number of ids of each text,
            int32[num_texts].
        """
        end = [end_id] if end_id >= 0 else []
        sequences = [ids + end if ids else ids for ids in self.encode_batch(texts)]
        lengths = np.array([len(ids) for ids in sequences], np.int32)
        num_ids = int(lengths.sum(dtype=np.int64))
        return np.fromiter(chain.from_iterable(sequences), np.int32, num_ids), lengths

    @property
    def runs_in_threads(self) -> bool:
        """Whether several threads of a process can encode at the same time."""
        return False

    def encode_json_lines(
        self, data: bytes, key: str, end_id: int, narrow: bool
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int] | None:
        """Parses JSON lines and encodes the text under one key, as `encode_arrays` does.

        Blank lines are skipped. If ``narrow`` is set, the ids are uint16 instead of int32.

        Returns:
            The two arrays of `encode_arrays` and the total size of the texts in UTF-8 bytes. None
            if the caller must parse the lines: the tokenizer does not implement this method, or a
            line needs a full JSON parser.
        """
        return None

    @abstractmethod
    def control_id(self, name: str) -> int | None:
        """Returns the id of a control token such as `<|im_start|>`, or None if there is none."""

    @property
    @abstractmethod
    def control_tokens(self) -> tuple[str, ...]:
        """The names of all control tokens."""

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, str]:
        """The tokens for `bos_token`, `eos_token` and so on, by the names in transformers."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Converts ids to text. Control ids are skipped."""

    def save_pretrained(
        self,
        folder: str | Path,
        chat_template: str | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        """Writes the files that `transformers.AutoTokenizer.from_pretrained(folder)` reads.

        Args:
            folder: The output folder, created if it is missing.
            chat_template: Jinja source of the chat template. None keeps the model's own template.
            add_bos_token: If True, the saved tokenizer adds BOS to every text. Otherwise it adds
                BOS only if this tokenizer does.

        Raises:
            UserError: If the folder cannot be written.
        """
        from megatron_chatflow.tokenizer import small_files  # which depends on this module

        small_files.save_tokenizer(self, Path(folder), chat_template, add_bos_token)


def prefixes_first_part(tokenizer_json: Mapping[str, Any]) -> bool:
    """Returns whether a `tokenizer.json` prepends a space only at the beginning of a text."""
    parts: list[Any] = [tokenizer_json.get("pre_tokenizer")]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            if part.get("prepend_scheme") == "first":
                return True
            parts += part.get("pretokenizers") or []  # of a sequence
    return False


def adds_bos_token(model_path: Path, bos_id: int) -> bool:
    """Returns whether a model's configuration adds BOS to every text.

    The result is `add_bos_token` of the `tokenizer_config.json` in the same folder. If it is not
    set, the post-processor of `tokenizer.json` determines the result. Without that file the result
    is True for transformers' `LlamaTokenizer` classes, which add BOS by default, and False for
    every other class and for a model without a configuration. It is False if `bos_id` is -1.
    """
    if bos_id < 0:
        return False
    config = read_tokenizer_config(model_path.parent)
    json_path = model_path if model_path.suffix == ".json" else model_path.parent / "tokenizer.json"
    return configured_bos(config, json_path.read_bytes() if json_path.is_file() else None, bos_id)


def configured_bos(config: Mapping[str, Any], tokenizer_json: bytes | None, bos_id: int) -> bool:
    """Computes `adds_bos_token` from the contents of the two files; the second may be None."""
    configured = config.get("add_bos_token")
    if isinstance(configured, bool):
        return configured
    if tokenizer_json is not None:
        try:
            opened = open_tokenizer_json(parse_tokenizer_json(tokenizer_json))
            with without_panic_output():
                ids: list[int] = opened.encode("a").ids
        except BaseException as error:  # a damaged file is reported when the model is loaded
            if not is_library_error(error):
                raise
            return False
        return ids[:1] == [bos_id]
    return config.get("tokenizer_class") in LLAMA_CLASSES


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Reads a folder's `tokenizer_config.json`. Returns an empty dictionary if it is missing.

    Raises:
        UserError: If the file cannot be read or is not a JSON object.
    """
    path = folder / "tokenizer_config.json"
    try:
        if not path.exists():
            return {}
        config = parse_json(read_bounded(path))
    except OSError as error:
        raise UserError(f"cannot read: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"not a tokenizer configuration: {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"not a tokenizer configuration: {path}: it is not a JSON object")
    return config


def read_model_file(path: Path) -> bytes:
    """Reads the bytes of a tokenizer's file.

    Raises:
        UserError: If the file cannot be read, is empty, or is larger than `MAX_MODEL_BYTES`.
    """
    try:
        data = read_bounded(path)
        if not data:
            raise ValueError("the file is empty")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read tokenizer model: {path}: {reason}") from error
    return data


def read_bounded(path: Path) -> bytes:
    """Reads a file of at most `MAX_MODEL_BYTES` bytes.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is larger, or is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is a folder or a device, not a file")
    with open(path, "rb") as file:
        data = file.read(MAX_MODEL_BYTES + 1)
    if len(data) > MAX_MODEL_BYTES:
        raise ValueError(f"it is longer than {MAX_MODEL_BYTES >> 20} MiB")
    return data


def sha256_of(data: bytes) -> str:
    """Returns the SHA-256 digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def without_surrogates(text: str) -> str:
    """Replaces each lone surrogate by U+FFFD and each surrogate pair by its character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_arrays(ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> list[list[int]]:
    """Converts the arrays that `Tokenizer.encode_arrays` returns to lists of ids."""
    flat = iter(ids.tolist())
    return [list(islice(flat, length)) for length in lengths.tolist()]

"""The `Tokenizer` protocol, and what its implementations share."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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

# transformers' classes that begin a text with BOS unless they are told otherwise.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
TOKENIZER_TYPES = ("Llama2Tokenizer", "HuggingFaceTokenizer")


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        tokenizer_type: One of `TOKENIZER_TYPES`.
        model_path: The file that it was loaded from.
        vocab_size: Number of ids.
        bos_id: Begin of sequence, or -1 where the model has none.
        eos_id: End of sequence, which is also the end-of-document token.
        pad_id: Padding; the end-of-sequence id where the model has none.
        unk_id: Unknown, or -1 where the model has none.
        num_bytes_per_id: int64[vocab_size], UTF-8 bytes of text that each id stands for; 0 for
            control ids and the unknown id.
        fingerprint: SHA-256 of the model file, hex.
    """

    tokenizer_type: str
    model_path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    fingerprint: str

    @property
    def add_bos_token(self) -> bool:
        """Whether the model's own configuration begins every text with BOS (`adds_bos_token`)."""

    @property
    def num_bytes_per_id(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of text that each id stands for, int64[vocab_size]."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text from its beginning, without BOS or EOS.

        Lone surrogates, which UTF-8 cannot hold, count as U+FFFD.
        """

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that follows other text: like `encode`, but with no space put first."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text."""

    def encode_arrays(
        self, texts: Sequence[str], end_id: int = -1
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """`encode` of every text, as arrays.

        Args:
            texts: The texts.
            end_id: Put behind the ids of every text that has any; -1 for nothing.

        Returns:
            int32, the ids of all texts one after the other; int32[num_texts], the number of each.
        """

    @property
    def runs_in_threads(self) -> bool:
        """Whether several threads of a process encode at the same time."""

    def encode_json_lines(
        self, data: bytes, key: str, end_id: int, narrow: bool
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int] | None:
        """`encode_arrays` of the text under a key of every line, JSON and all, in one go.

        Args:
            data: JSON lines; blank ones are passed over.
            key: The key.
            end_id: Put behind the ids of every text that has any; -1 for nothing.
            narrow: Whether the ids come as uint16 instead of int32.

        Returns:
            The two arrays, and the texts' bytes in UTF-8; None if the caller has to parse the
            lines: the tokenizer has no such function, or a line is not plain sailing.
        """

    def control_id(self, name: str) -> int | None:
        """The id of a control token such as `<|im_start|>`; None where it is no such token."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The names of all control tokens."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """Which of them are `bos_token`, `eos_token` and so on, by transformers' names."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids vanish."""

    def save_pretrained(
        self,
        folder: str | Path,
        chat_template: str | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        """Writes what `transformers.AutoTokenizer.from_pretrained(folder)` reads.

        Args:
            folder: Made if it is missing.
            chat_template: Jinja source that turns messages into a prompt; None keeps the model's.
            add_bos_token: True has the folder's tokenizer begin a text with BOS; else it does so
                where this one does.
        """


def adds_bos_token(model_path: Path, bos_id: int) -> bool:
    """Whether a model's configuration begins every text with BOS.

    `add_bos_token` in the `tokenizer_config.json` beside the model decides. Without it, the
    post-processor of `tokenizer.json` does, and without that file the default of transformers'
    `LlamaTokenizer`, which is true. A model file with no configuration has no BOS.

    Args:
        model_path: The tokenizer's file.
        bos_id: Its BOS, or -1.
    """
    if bos_id < 0:
        return False
    config = read_tokenizer_config(model_path.parent)
    json_path = model_path if model_path.suffix == ".json" else model_path.parent / "tokenizer.json"
    return configured_bos(config, json_path.read_bytes() if json_path.is_file() else None, bos_id)


def configured_bos(config: Mapping[str, Any], tokenizer_json: bytes | None, bos_id: int) -> bool:
    """`adds_bos_token` from the contents of the two files; None where there is no second."""
    configured = config.get("add_bos_token")
    if isinstance(configured, bool):
        return configured
    if tokenizer_json is not None:
        try:
            opened = open_tokenizer_json(parse_tokenizer_json(tokenizer_json))
            with without_panic_output():
                ids: list[int] = opened.encode("a").ids
        except BaseException as error:  # loading the model reports it
            if not is_library_error(error):
                raise
            return False
        return ids[:1] == [bos_id]
    return config.get("tokenizer_class") in LLAMA_CLASSES


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `tokenizer_config.json`; empty where there is none.

    Raises:
        UserError: It is not a JSON object.
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
        raise UserError(f"not a tokenizer configuration: {path}: it is no object")
    return config


def read_model_file(path: Path) -> bytes:
    """The bytes of a tokenizer's file.

    Raises:
        UserError: It cannot be read, or is empty.
    """
    try:
        data = read_bounded(path)
    except OSError as error:
        raise UserError(f"cannot read tokenizer model: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"cannot read tokenizer model: {path}: {error}") from error
    if not data:
        raise UserError(f"cannot read tokenizer model: {path}: the file is empty")
    return data


def read_bounded(path: Path) -> bytes:
    """The bytes of a file of no more than `MAX_MODEL_BYTES`.

    Raises:
        OSError: It cannot be read.
        ValueError: It is longer, or no file.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is a folder or a device, not a file")
    with open(path, "rb") as file:
        data = file.read(MAX_MODEL_BYTES + 1)
    if len(data) > MAX_MODEL_BYTES:
        raise ValueError(f"it is longer than {MAX_MODEL_BYTES >> 20} MiB")
    return data


def sha256_of(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def without_surrogates(text: str) -> str:
    """The text with each lone surrogate as U+FFFD (a pair of them becomes its character)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def join_arrays(
    sequences: Sequence[list[int]], end_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """What `Tokenizer.encode_arrays` returns, from lists of ids."""
    end = [end_id] if end_id >= 0 else []
    ended = [ids + end if ids else ids for ids in sequences]
    lengths = np.array([len(ids) for ids in ended], np.int32)
    flat = np.empty(int(lengths.sum(dtype=np.int64)), np.int32)
    position = 0
    for ids in ended:
        flat[position : position + len(ids)] = ids
        position += len(ids)
    return flat, lengths


def split_arrays(ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> list[list[int]]:
    """Lists of ids, from what `Tokenizer.encode_arrays` returns."""
    sequences: list[list[int]] = []
    position = 0
    for length in lengths.tolist():
        sequences.append(ids[position : position + length].tolist())
        position += length
    return sequences

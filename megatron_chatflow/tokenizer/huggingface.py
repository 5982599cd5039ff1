"""Hugging Face `tokenizer.json` models (`HuggingFaceTokenizer`).

The ids equal those of the `tokenizers` library with `encode_special_tokens` enabled, so a literal
`<s>` or `<|endoftext|>` in raw text is encoded as text. If the same folder has a
`tokenizer_config.json`, it names the special tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from typing_extensions import override

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.base import (
    Tokenizer,
    prefixes_first_part,
    read_model_file,
    read_tokenizer_config,
    sha256_of,
    without_surrogates,
)
from megatron_chatflow.tokenizer.tokenizer_json import (
    library_errors,
    open_tokenizer_json,
    parse_tokenizer_json,
)

# Common names of special tokens for a model without a configuration, in order of preference.
COMMON_NAMES = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<|im_start|>", "<|endoftext|>", "[CLS]"),
    "eos_token": ("</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
    "unk_token": ("<unk>", "[UNK]"),
}


class HuggingFaceTokenizer(Tokenizer):
    """A `Tokenizer` for a Hugging Face `tokenizer.json`."""

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(self, path: Path) -> None:
        """Loads a `tokenizer.json`.

        Raises:
            UserError: If the file cannot be read, is not a valid model, or has no EOS token.
        """
        self.model_path = path
        data = read_model_file(path)
        self.fingerprint = sha256_of(data)
        try:
            self._content = parse_tokenizer_json(data)
            self._tokenizer = open_tokenizer_json(self._content)
        except ValueError as error:
            raise UserError(f"not a tokenizer.json: {path}: {error}; download it again") from error
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self._special_tokens = _special_tokens(path, self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self._control_ids = {token.content: i for i, token in added.items() if token.special}
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.unk_id = self._id_of("unk_token")
        if self.eos_id < 0:
            raise UserError(
                f"tokenizer has no EOS token: {path}: set eos_token in the tokenizer_config.json "
                "next to it"
            )
        pad_id = self._id_of("pad_token")
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id

    def _id_of(self, name: str) -> int:
        piece = self._special_tokens.get(name)
        token_id = None if piece is None else self._tokenizer.token_to_id(piece)
        return -1 if token_id is None else int(token_id)

    @cached_property
    def _continuing_tokenizer(self) -> tokenizers.Tokenizer:
        with library_errors(f"not a tokenizer.json: {self.model_path}"):
            return open_tokenizer_json(_without_prefix_space(self._content))

    @cached_property
    @override
    def prefixes_every_part(self) -> bool:
        return not prefixes_first_part(self._content)

    @cached_property
    @override
    def num_bytes_per_id(self) -> npt.NDArray[np.int64]:
        num_bytes = np.zeros(self.vocab_size, np.int64)
        byte_level = _mentions(self._content.get("decoder"), "ByteLevel")
        for piece, token_id in self._tokenizer.get_vocab().items():
            if byte_level:
                num_bytes[token_id] = len(piece)  # each byte is written as one character
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                num_bytes[token_id] = 1
            else:
                num_bytes[token_id] = len(piece.replace("\u2581", " ").encode())
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            num_bytes[token_id] = 0 if token.special else len(token.content.encode())
        if self.unk_id >= 0:
            num_bytes[self.unk_id] = 0
        return num_bytes

    @override
    def encode_continuation(self, text: str) -> list[int]:
        return self._encode_batch(self._continuing_tokenizer, [text])[0]

    @override
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode_batch(self._tokenizer, texts)

    def _encode_batch(
        self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
    ) -> list[list[int]]:
        with library_errors(f"cannot encode text: {self.model_path}"):
            try:
                encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            # The type of the error for a lone surrogate depends on the library's version.
            except (UnicodeEncodeError, TypeError):
                cleaned = [without_surrogates(text) for text in texts]
                encodings = tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    @override
    def control_id(self, name: str) -> int | None:
        return self._control_ids.get(name)

    @property
    @override
    def control_tokens(self) -> tuple[str, ...]:
        return tuple(self._control_ids)

    @property
    @override
    def special_tokens(self) -> dict[str, str]:
        return dict(self._special_tokens)

    @override
    def decode(self, ids: Sequence[int]) -> str:
        with library_errors(f"cannot decode ids: {self.model_path}"):
            return self._tokenizer.decode([int(token_id) for token_id in ids])


def _special_tokens(path: Path, tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """Finds the special tokens in `tokenizer_config.json`, or by their common names."""
    config = read_tokenizer_config(path.parent)
    found = {}
    for name, candidates in COMMON_NAMES.items():
        value = config.get(name)
        piece = value.get("content") if isinstance(value, dict) else value
        if name not in config:
            known = [known for known in candidates if tokenizer.token_to_id(known) is not None]
            piece = known[0] if known else None
        if isinstance(piece, str):
            found[name] = piece
    return found


def _mentions(part: Any, kind: str) -> bool:
    """Returns whether a component of a `tokenizer.json`, or one nested in it, has a type."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(_mentions(value, kind) for value in part)


def _without_prefix_space(part: Any) -> Any:
    """Returns the same model without the components that prepend a space to a text."""
    if isinstance(part, list):
        kept = [item for item in part if not (isinstance(item, dict) and _is_prepend(item))]
        return [_without_prefix_space(item) for item in kept]
    if not isinstance(part, dict):
        return part
    changed: dict[str, Any] = {}
    for key, value in part.items():
        if key == "vocab" or (isinstance(value, dict) and _is_prepend(value)):
            changed[key] = value if key == "vocab" else None
        elif key == "add_prefix_space":
            changed[key] = False
        elif key == "prepend_scheme":
            changed[key] = "never"
        else:
            changed[key] = _without_prefix_space(value)
    return changed


def _is_prepend(component: dict[str, Any]) -> bool:
    return component.get("type") == "Prepend"

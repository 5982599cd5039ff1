"""Converts the byte-level BPE tokenizer of a GGUF file to Hugging Face files.

`tokenizer.json` and `tokenizer_config.json`, with the chat template, are read by `transformers`
and `load_tokenizer`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
from megatron_chatflow.tokenizer.tokenizer_json import error_text, is_library_error

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types
_SPECIAL_NAMES = ("bos", "eos", "pad", "unk")
_GGUF_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def special_ids(fields: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns `bos_token_id`, `eos_token_id` and `pad_token_id`; None if absent."""
    return {f"{name}_token_id": _special_id(fields, name) for name in ("bos", "eos", "pad")}


def _special_id(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(f"tokenizer.ggml.{_GGUF_NAMES[name]}_token_id")
    return int(value) if value is not None else None


def write_tokenizer(
    path: Path, fields: Mapping[str, Any], folder: Path, max_position_embeddings: int
) -> None:
    """Writes the tokenizer's files.

    Args:
        path: The GGUF file, named in errors.
        fields: Its key-value pairs.
        folder: The output folder.
        max_position_embeddings: Maximum length of the model's input in tokens.

    Raises:
        UserError: There is no tokenizer, or it is not a supported byte-level BPE.
    """
    tokens = fields.get("tokenizer.ggml.tokens") or []
    tokenizer = build_tokenizer(path, fields)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position_embeddings,
    }
    for name in _SPECIAL_NAMES:
        token_id = _special_id(fields, name)
        if token_id is not None:
            if token_id >= len(tokens):
                raise UserError(
                    f"{path}: {name} token {token_id} is outside the vocabulary; download it again"
                )
            config[f"{name}_token"] = tokens[token_id]
    config["chat_template"] = fields.get("tokenizer.chat_template") or JINJA_TEMPLATES["chatml"]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def build_tokenizer(path: Path, fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        path: The file, named in errors.
        fields: Its key-value pairs.

    Raises:
        UserError: It is of another kind or inconsistent.
    """
    kind = fields.get("tokenizer.ggml.model")
    tokens: list[str] = fields.get("tokenizer.ggml.tokens") or []
    merges: list[str] = fields.get("tokenizer.ggml.merges") or []
    if kind != "gpt2" or not merges:
        raise UserError(
            f"{path}: tokenizer type {kind!r} is not supported, only byte-level BPE ('gpt2'); "
            "use the tokenizer of the original model folder"
        )
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError(f"{path}: its vocabulary contains a token twice; download it again")
    # Tokens contain no spaces, so the one space in a merge separates its two tokens.
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except BaseException as error:
        if not is_library_error(error):
            raise
        text = error_text(error)
        raise UserError(
            f"{path}: its merges do not match its vocabulary ({text}); download it again"
        ) from None
    tokenizer.pre_tokenizer = _pre_tokenizer(path, str(fields.get("tokenizer.ggml.pre")))
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(token, special=token_type == _CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    bos = _special_id(fields, "bos")
    if fields.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=None, special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _pre_tokenizer(path: Path, name: str) -> Any:
    """Returns the pre-tokenizer of llama.cpp's name."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raise UserError(
        f"{path}: pre-tokenizer {name!r} is not supported, only gpt-2 and smollm; use the "
        "tokenizer of the original model folder"
    )

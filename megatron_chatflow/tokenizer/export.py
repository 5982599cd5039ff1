"""Writes a SentencePiece model as a folder that `transformers` reads, with the same ids.

In: the model's bytes and its tokenizer. Out: `tokenizer.model`, `tokenizer.json`,
`tokenizer_config.json`, `special_tokens_map.json`.

`tokenizer.json` is tried on the model's own pieces before it is kept. Where its ids differ (a
unigram model, a normaliser with a character map, user-defined symbols), only `tokenizer.model` is
written, which transformers converts or reads itself.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)
SPACE = "\u2581"
NORMAL = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
BYTE = sentencepiece_model_pb2.ModelProto.SentencePiece.BYTE
BPE = sentencepiece_model_pb2.TrainerSpec.BPE


def save_sentencepiece(
    model_bytes: bytes,
    tokenizer: Tokenizer,
    folder: Path,
    chat_template: str | None,
    *,
    add_bos_token: bool,
) -> None:
    """Writes the folder.

    Args:
        model_bytes: The serialized SentencePiece model.
        tokenizer: Gives the ids that `tokenizer.json` has to reproduce.
        folder: Made if it is missing.
        chat_template: Jinja source that turns messages into a prompt.
        add_bos_token: Whether the folder's tokenizer begins a text with BOS.

    Raises:
        UserError: The folder cannot be written.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(model_bytes)
    converted = _tokenizer_json(model)
    exact = converted is not None and _gives_same_ids(converted, tokenizer, model)
    if not exact:
        logger.warning(
            "tokenizer.json would not give this model's ids: only tokenizer.model written"
        )
    trainer = model.trainer_spec
    special_tokens = {
        name: model.pieces[token_id].piece
        for name, token_id in [
            ("bos_token", trainer.bos_id),
            ("eos_token", trainer.eos_id),
            ("unk_token", trainer.unk_id),
            ("pad_token", trainer.pad_id),
        ]
        if token_id >= 0
    }
    if exact and converted is not None and add_bos_token:
        # transformers 5 reads this and not `add_bos_token` where there is a tokenizer.json.
        bos_id = trainer.bos_id
        converted["post_processor"] = _beginning_with(model.pieces[bos_id].piece, bos_id, None)
    # The class that takes tokenizer.json as it stands: transformers' own LlamaTokenizer replaces
    # the normaliser, and then puts no space before text that begins with one.
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if exact else "LlamaTokenizer",
        "add_bos_token": add_bos_token,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **special_tokens,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    files: dict[str, bytes] = {
        "tokenizer.model": model_bytes,
        "tokenizer_config.json": _json_bytes(config),
        "special_tokens_map.json": _json_bytes(special_tokens),
    }
    if exact:
        files["tokenizer.json"] = _json_bytes(converted)
    write_folder(folder, files)


def copy_huggingface(
    tokenizer_json: Path,
    special_tokens: dict[str, str],
    folder: Path,
    chat_template: str | None,
    *,
    new_bos: tuple[str, int] | None = None,
) -> None:
    """Copies a `tokenizer.json` with what lies beside it into a folder that transformers reads.

    Args:
        tokenizer_json: The file; `tokenizer_config.json` beside it is taken over if it is there.
        special_tokens: Names such as "eos_token" to pieces, for a missing configuration.
        folder: Made if it is missing.
        chat_template: Jinja source that turns messages into a prompt; None keeps the file's own.
        new_bos: A BOS token and its id, for a tokenizer that is to begin a text with it and does
            not do so yet; None keeps `tokenizer.json` byte for byte.

    Raises:
        UserError: The folder cannot be written.
    """
    config_path = tokenizer_json.with_name("tokenizer_config.json")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens}
    if config_path.exists():
        config.update(json.loads(config_path.read_text(encoding="utf-8")))
    if chat_template is not None:
        config["chat_template"] = chat_template
    data = tokenizer_json.read_bytes()
    if new_bos is not None:
        config["add_bos_token"] = True
        content = json.loads(data)
        content["post_processor"] = _beginning_with(*new_bos, content.get("post_processor"))
        data = _json_bytes(content)
    files = {
        "tokenizer.json": data,
        "tokenizer_config.json": _json_bytes(config),
    }
    write_folder(folder, files)


def _beginning_with(token: str, token_id: int, present: dict[str, Any] | None) -> dict[str, Any]:
    """A post-processor of `tokenizer.json` that does what `present` does, behind a first token."""
    if present is not None and present["type"] == "Sequence":
        steps = list(present["processors"])
    else:
        steps = [] if present is None else [present]
    first, second = ({"Sequence": {"id": name, "type_id": k}} for k, name in enumerate("AB"))
    template: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [first],
        "pair": [first, second],
        "special_tokens": {},
    }
    kinds = [step["type"] for step in steps]
    if template["type"] in kinds:
        template = steps.pop(kinds.index(template["type"]))
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    known = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    template = {
        **template,
        "single": [begin, *template["single"]],
        "pair": [begin, *template["pair"]],
        "special_tokens": {**template["special_tokens"], **known},
    }
    return {"type": "Sequence", "processors": [*steps, template]} if steps else template


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes small files into a folder, each whole under its name or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            partial = folder / f"{name}.partial"
            partial.write_bytes(data)
            os.replace(partial, folder / name)
    except OSError as error:
        raise UserError(f"cannot write tokenizer: {folder}: {error.strerror}") from error


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def _tokenizer_json(model: Any) -> dict[str, Any] | None:
    """The `tokenizer.json` of a byte-pair model, or None where the format cannot express it."""
    spec = model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    expressible = (
        model.trainer_spec.model_type == BPE
        and not spec.precompiled_charsmap
        and not spec.remove_extra_whitespaces
        and spec.escape_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
        and sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED not in kinds
        and sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED not in kinds
    )
    if not expressible:
        return None
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _special_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _special_tokens(model: Any) -> list[dict[str, Any]]:
    """Pieces that stand for no text: unknown, begin, end and other control tokens."""
    return [
        {
            "id": token_id,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token_id, piece in enumerate(model.pieces)
        if piece.type not in (NORMAL, BYTE)
    ]


def _merges(model: Any) -> list[list[str]]:
    """The merges behind a byte-pair model's scores, best first.

    SentencePiece joins the neighbours whose joint piece has the highest score, so every way to cut
    a piece into two pieces is a merge of that score.
    """
    ids = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    merges = []
    for piece, token_id in ids.items():
        score = model.pieces[token_id].score
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-score, token_id, ids[left], ids[right], left, right))
    merges.sort()
    return [[left, right] for *_, left, right in merges]


def _gives_same_ids(converted: dict[str, Any], tokenizer: Tokenizer, model: Any) -> bool:
    """Tries the conversion on the model's pieces, alone and strung together."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(converted))
    theirs.encode_special_tokens = True
    pieces = [piece.piece.replace(SPACE, " ") for piece in model.pieces if piece.type == NORMAL]
    probes = ["", " ", "  a\t\nb\x00", "<s></s>", "\ue000\U0001f9ff", *pieces]
    probes += ["".join(pieces[k : k + 64]) for k in range(0, len(pieces), 61)]
    encodings = theirs.encode_batch(probes, add_special_tokens=False)
    ours = tokenizer.encode_batch(probes)
    return all(encoding.ids == ids for encoding, ids in zip(encodings, ours, strict=True))

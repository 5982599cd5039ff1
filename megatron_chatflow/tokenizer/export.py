"""Converts a SentencePiece model to the files that transformers reads, with the same ids.

The generated `tokenizer.json` is checked on the model's own pieces. If it cannot be generated (for
a unigram model, a normalizer with a character map, or user-defined symbols) or its ids differ, only
`tokenizer.model` and its configuration are written, and transformers converts or reads that file.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.tokenizer.base import LLAMA_CLASSES, Tokenizer
from megatron_chatflow.tokenizer.bpe import structural_obstacles
from megatron_chatflow.tokenizer.tokenizer_json import library_errors, open_tokenizer_json

logger = logging.getLogger(__name__)
SPACE = "\u2581"
NORMAL = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
BYTE = sentencepiece_model_pb2.ModelProto.SentencePiece.BYTE


def sentencepiece_files(
    model_bytes: bytes,
    tokenizer: Tokenizer,
    base: Mapping[str, Any] | None = None,
    post_processor: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Creates the files from which transformers loads a SentencePiece model, by name.

    Args:
        model_bytes: The serialized SentencePiece model.
        tokenizer: The same model, loaded. `tokenizer.json` must reproduce its ids.
        base: Content of the `tokenizer_config.json` of the tokenizer from which this one is
            derived. Its settings are kept.
        post_processor: The post-processor in the `tokenizer.json` of the tokenizer from which
            this one is derived. If None, BOS and EOS are added as `base` specifies.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(model_bytes)
    converted = _tokenizer_json(model, tokenizer.unk_id)
    exact = converted is not None and _gives_same_ids(converted, tokenizer, model)
    if not exact:
        logger.warning(
            "a tokenizer.json would give other ids than this model: writing only tokenizer.model"
        )
    # sentencepiece finds these by their names. The ids in the trainer's settings may be wrong.
    special_tokens = {
        name: model.pieces[token_id].piece
        for name, token_id in [
            ("bos_token", tokenizer.bos_id),
            ("eos_token", tokenizer.eos_id),
            ("unk_token", tokenizer.unk_id),
            ("pad_token", -1 if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id),
        ]
        if token_id >= 0
    }
    config: dict[str, Any] = dict(base or {})
    if not base:
        config |= {
            "add_bos_token": False,  # the training data has no BOS
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
    elif config.get("tokenizer_class") in LLAMA_CLASSES:
        # Write down the defaults of this class, because the class may change below.
        config.setdefault("padding_side", "left")
        config.setdefault("add_bos_token", post_processor is None)
    config = {**special_tokens, **config}
    # Only this class uses tokenizer.json unchanged. transformers' LlamaTokenizer replaces the
    # normalizer, which then adds no space before a text that begins with a space.
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if exact else "LlamaTokenizer"
    files = {
        "tokenizer.model": model_bytes,
        "tokenizer_config.json": _json_bytes(config),
        "special_tokens_map.json": _json_bytes(special_tokens),
    }
    if converted is not None and exact:
        if post_processor is None:
            # If there is a tokenizer.json, transformers 5 ignores `add_bos_token` and uses this.
            bos, eos = tokenizer.bos_id, tokenizer.eos_id
            adds_bos = config.get("add_bos_token") and bos >= 0
            before = [(special_tokens["bos_token"], bos)] if adds_bos else []
            behind = [(special_tokens["eos_token"], eos)] if config.get("add_eos_token") else []
            if before or behind:
                post_processor = with_special_tokens(None, before, behind)
        converted["post_processor"] = post_processor
        files["tokenizer.json"] = _json_bytes(converted)
    return files


def with_special_tokens(
    post_processor: dict[str, Any] | None,
    before: Sequence[tuple[str, int]],
    behind: Sequence[tuple[str, int]] = (),
) -> dict[str, Any]:
    """Extends a post-processor of a `tokenizer.json`, or None, to add tokens around every text.

    The tokens to add before and behind a text are given by name and id.
    """
    kind = "TemplateProcessing"
    if post_processor is not None and post_processor["type"] != kind:
        is_sequence = post_processor["type"] == "Sequence"
        steps = list(post_processor["processors"]) if is_sequence else [post_processor]
        templates = [step for step in steps if step["type"] == kind]
        others = [step for step in steps if step["type"] != kind]
        added = with_special_tokens(templates[0] if templates else None, before, behind)
        return {"type": "Sequence", "processors": [*others, added]}
    base = post_processor or {
        "single": [_sequence("A", 0)],
        "pair": [_sequence("A", 0), _sequence("B", 1)],
        "special_tokens": {},
    }

    def surrounded(part: dict[str, Any]) -> list[dict[str, Any]]:
        if "Sequence" not in part:
            return [part]
        number = part["Sequence"]["type_id"]
        tokens = [
            [{"SpecialToken": {"id": name, "type_id": number}} for name, _ in names]
            for names in (before, behind)
        ]
        return [*tokens[0], part, *tokens[1]]

    known = {
        name: {"id": name, "ids": [token_id], "tokens": [name]}
        for name, token_id in (*before, *behind)
    }
    return {
        "type": kind,
        "single": [part for item in base["single"] for part in surrounded(item)],
        "pair": [part for item in base["pair"] for part in surrounded(item)],
        "special_tokens": {**base["special_tokens"], **known},
    }


def _sequence(name: str, number: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": number}}


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def _tokenizer_json(model: Any, unk_id: int) -> dict[str, Any] | None:
    """Creates the `tokenizer.json` of a model, or returns None if the format cannot express it."""
    spec = model.normalizer_spec
    if any(structural_obstacles(model).values()):
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
        # The unknown token and control tokens do not represent text.
        "added_tokens": [
            added_token(token_id, piece.piece, special=True)
            for token_id, piece in enumerate(model.pieces)
            if piece.type not in (NORMAL, BYTE)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[unk_id].piece if unk_id >= 0 else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    """Creates an entry of `added_tokens` in a `tokenizer.json`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": special}


def _merges(model: Any) -> list[list[str]]:
    """Derives the merges of a byte-pair model from its scores, in descending order of score.

    SentencePiece joins the adjacent pair that forms the piece with the highest score. Every way to
    split a piece into two pieces is therefore a merge with the score of the piece.
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
    """Compares the ids of the conversion on the model's pieces, alone and concatenated."""
    try:
        theirs = open_tokenizer_json(converted)
    except ValueError:
        return False
    pieces = [piece.piece.replace(SPACE, " ") for piece in model.pieces if piece.type == NORMAL]
    probes = ["", " ", "  a\t\nb\x00", "<s></s>", "\ue000\U0001f9ff", *pieces]
    probes += ["".join(pieces[k : k + 64]) for k in range(0, len(pieces), 61)]
    with library_errors("cannot encode text"):
        encodings = theirs.encode_batch(probes, add_special_tokens=False)
    ours = tokenizer.encode_batch(probes)
    return all(encoding.ids == ids for encoding, ids in zip(encodings, ours, strict=True))

"""Tokenizers: SentencePiece models and Hugging Face `tokenizer.json` behind one interface.

`load_tokenizer` returns a `Tokenizer` whose ids equal those of the model's own library for any
text. Raw text is never encoded to a control id.
"""

from pathlib import Path

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.base import TOKENIZER_TYPES, Tokenizer
from megatron_chatflow.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_chatflow.tokenizer.sentencepiece_model import SentencePieceTokenizer

__all__ = ["TOKENIZER_TYPES", "Tokenizer", "load_tokenizer"]


def load_tokenizer(tokenizer_model: str | Path, tokenizer_type: str = "auto") -> Tokenizer:
    """Opens a tokenizer.

    Args:
        tokenizer_model: A SentencePiece `.model`, a `tokenizer.json`, or a folder with one of them.
            If a folder has both, "auto" selects the SentencePiece model, because the
            `tokenizer.json` is usually converted from it.
        tokenizer_type: `Llama2Tokenizer` (SentencePiece), `HuggingFaceTokenizer`, or "auto".

    Raises:
        UserError: If the type is unknown, or the file is missing or is not a model of that type.
    """
    path = Path(tokenizer_model)
    if tokenizer_type not in (*TOKENIZER_TYPES, "auto"):
        known = ", ".join(TOKENIZER_TYPES)
        raise UserError(f"unknown tokenizer type: {tokenizer_type}: use one of {known}, auto")
    if not path.exists():
        raise UserError(f"tokenizer model not found: {path}: use an existing file or folder")
    if tokenizer_type == "auto":
        is_json = path.suffix == ".json" or (path / "tokenizer.json").exists()
        has_sentencepiece = (path / "tokenizer.model").exists()
        tokenizer_type = TOKENIZER_TYPES[1 if is_json and not has_sentencepiece else 0]
    wanted, other = ("tokenizer.model", "tokenizer.json")
    if tokenizer_type == "HuggingFaceTokenizer":
        wanted, other = other, wanted
    if path.is_dir() and not (path / wanted).exists():
        if (path / other).exists():
            has = f"has {other} but no {wanted}: do not set the tokenizer type"
        else:
            has = f"has neither {wanted} nor {other}: use the folder or file of a tokenizer"
        raise UserError(f"tokenizer model not found: {path}: {has}")
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(path / "tokenizer.json" if path.is_dir() else path)
    return SentencePieceTokenizer(path / "tokenizer.model" if path.is_dir() else path)

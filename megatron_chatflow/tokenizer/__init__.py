"""Tokenizers: SentencePiece models and Hugging Face `tokenizer.json` behind one protocol.

`load_tokenizer` returns a `Tokenizer` whose ids equal those of the model's own library for any
text. Raw text is never encoded to a control id.
"""

from megatron_chatflow.tokenizer.base import TOKENIZER_TYPES, Tokenizer
from megatron_chatflow.tokenizer.load import load_tokenizer

__all__ = ["TOKENIZER_TYPES", "Tokenizer", "load_tokenizer"]

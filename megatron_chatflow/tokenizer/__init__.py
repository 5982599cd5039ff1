"""Tokenizers: SentencePiece models and Hugging Face `tokenizer.json` behind one protocol.

In: a model file or folder. Out: `Tokenizer`, whose ids are those of the model's own library, for
any text: raw text never becomes a control id.
"""

from megatron_chatflow.tokenizer.base import TOKENIZER_TYPES, Tokenizer
from megatron_chatflow.tokenizer.load import load_tokenizer

__all__ = ["TOKENIZER_TYPES", "Tokenizer", "load_tokenizer"]

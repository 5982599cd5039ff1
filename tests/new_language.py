"""A made-up language of new characters, and a small LLaMA trained on it byte by byte.

The tokenizer of the model lacks the characters. The model is trained until the rows of its byte
pieces carry meaning, so that the initialization of new rows makes a measurable difference.
"""

import random
from pathlib import Path

import torch

from megatron_chatflow.tokenizer import Tokenizer

NEW = [chr(0x6000 + 13 * k) for k in range(24)]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
NUM_SPARE_ROWS = 5  # Rows without a piece, which some models have.


def new_sentences(count: int, seed: int) -> list[str]:
    """Returns text in which each new character is followed by its usual successors."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        place, text = generator.randrange(24), ""
        for _ in range(12):
            text += NEW[place]
            place = (5 * place + generator.choice((1, 1, 1, 2))) % 24
        texts.append(text)
    return texts


def train_model(
    old: Tokenizer, folder: Path, *, is_tied: bool = False, num_steps: int = 40
) -> Path:
    """Trains a LLaMA on the language with the old tokenizer.

    Args:
        old: A tokenizer without the new characters.
        folder: The folder in which the Hugging Face folder is created.
        is_tied: Whether the embedding is the output layer.
        num_steps: Number of training steps.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocab_size = old.vocab_size + NUM_SPARE_ROWS
    config = LlamaConfig(
        vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, tie_word_embeddings=is_tied, **SHAPE
    )
    model = LlamaForCausalLM(config)
    texts = ["".join(new_sentences(2, seed)) for seed in range(64)]
    ids = torch.tensor([old.encode(text)[:72] for text in texts])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(num_steps):
        batch = ids[torch.arange(16) + step * 16 % 64]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    old.save_pretrained(folder)
    return folder

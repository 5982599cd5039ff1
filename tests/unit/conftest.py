"""A small random LLaMA as a Hugging Face folder, for tests that write or read text."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_llama(tiny_sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a LLaMA with the tiny tokenizer, the chatflow template and a context of 96 tokens.

    Its weights are far from 0.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
    from megatron_chatflow.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_sentencepiece_model)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:259] = 0  # control ids and bytes, which rarely form characters
    folder = tmp_path_factory.mktemp("random_llama") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, JINJA_TEMPLATES["chatflow"])
    return folder

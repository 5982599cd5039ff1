"""Hugging Face folders of a random LLaMA with every kind of rotary scaling."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_shape
import torch
from safetensors.torch import save_file

from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.weight_map import huggingface_shapes

SHAPE = replace(
    tiny_shape.SHAPE,
    hidden_size=64,
    ffn_hidden_size=96,
    vocab_size=300,
    max_position_embeddings=64,
    rotary_base=5000.0,
)

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, **LLAMA3},
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
}


def folder_of(folder: Path, **config: Any) -> Path:
    """Creates a Hugging Face folder with random weights and a changed config.json."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.3 * torch.randn(size, generator=generator) + (len(size) == 1)
        for name, size in huggingface_shapes(SHAPE).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = {**huggingface_config(SHAPE, torch.float32, {}), **config}
    (folder / "config.json").write_text(json.dumps(written))
    return folder

"""Tests imports, exports and vocabulary extensions that are killed or interrupted and run again."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_shape
import torch
from safetensors.torch import save_file

from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.weight_map import huggingface_shapes

pytestmark = pytest.mark.slow

JOB = Path(__file__).with_name("killed_conversion.py")
SHAPE = replace(tiny_shape.SHAPE, num_layers=1)


def test_nothing_is_left_of_conversions_that_were_killed(
    tmp_path: Path, tiny_sentencepiece_model: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {name: torch.rand(size) for name, size in huggingface_shapes(SHAPE).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(huggingface_config(SHAPE, torch.float32, {})))
    shutil.copy(tiny_sentencepiece_model, tmp_path / "tokenizer.model")
    (tmp_path / "pieces.txt").write_text("ばな\nかき\nなし\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(JOB), str(tmp_path), "14"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]

"""Tests that conversion holds one tensor and one shard in memory, whatever the number of layers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chatflow.convert.safetensors import plan_shards
from megatron_chatflow.convert.shape import LlamaShape, huggingface_config
from megatron_chatflow.convert.weight_map import huggingface_shapes, placements

pytestmark = pytest.mark.slow

SHARD_BYTES = 4_000_000
# Allowance beside a tensor and a shard: a copy in another dtype or order, pickled data, and the
# allocator's overhead.
SLACK_BYTES = 12_000_000
NUM_LAYERS = 64

PROGRAM = """
import gc, sys
from pathlib import Path
import torch
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.from_huggingface import import_huggingface

torch.set_num_threads(1)
folder, which, shard_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def convert(name):
    if which == "import":
        import_huggingface(folder / name, folder / f"{name}_checkpoint")
    else:
        source, target = folder / f"{name}_checkpoint", folder / f"{name}_again"
        export_checkpoint(source, target, max_shard_bytes=shard_bytes)

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

convert("small")  # what the libraries take once
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
convert("large")
print(resident("VmHWM") - before)
"""


def shape_of(num_layers: int) -> LlamaShape:
    """Returns a shape with this number of layers. Tensor sizes do not depend on it."""
    return LlamaShape(
        num_layers=num_layers,
        hidden_size=512,
        ffn_hidden_size=1024,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=1000,
        max_position_embeddings=64,
        rotary_base=1e4,
        norm_epsilon=1e-5,
        init_method_std=0.02,
        untie_embeddings_and_output_weights=False,
    )


def write_sparse(folder: Path, shape: LlamaShape) -> None:
    """Writes a folder of bf16 zeros in shards whose values take no disk space."""
    shapes = huggingface_shapes(shape)
    sizes = {name: 2 * torch.Size(size).numel() for name, size in shapes.items()}
    folder.mkdir()
    files: dict[str, str] = {}
    for number, shard in enumerate(plan_shards(sizes, SHARD_BYTES)):
        entries: dict[str, Any] = {}
        end = 0
        for name in shard:
            begin, end = end, end + sizes[name]
            entries[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [begin, end],
            }
            files[name] = f"model-{number:05d}.safetensors"
        header = json.dumps(entries).encode()
        with open(folder / f"model-{number:05d}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = huggingface_config(shape, torch.bfloat16, {})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    shape = shape_of(NUM_LAYERS)
    write_sparse(tmp_path / "small", shape_of(1))
    write_sparse(tmp_path / "large", shape)
    largest = max(2 * torch.Size(rule.shape(shape)).numel() for rule, _ in placements(shape))
    total = sum(2 * torch.Size(size).numel() for size in huggingface_shapes(shape).values())
    bound = largest + SHARD_BYTES + SLACK_BYTES
    assert total >= 15 * bound
    for which in ("import", "export"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, tmp_path, which, str(SHARD_BYTES)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) <= bound, which
    assert len(list((tmp_path / "large_again").glob("*.safetensors"))) >= 20

"""Conversion holds a tensor or two in memory, however large the model is."""

import subprocess
import sys
from pathlib import Path

# A model of 126 MB in 24 layers; its largest tensor has 2.9 MB.
PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from megatron_chatflow.checkpoint.convert_export import export_checkpoint
from megatron_chatflow.checkpoint.convert_import import import_huggingface
from megatron_chatflow.checkpoint.convert_safetensors import write_shards
from megatron_chatflow.checkpoint.convert_shape import LlamaShape, huggingface_config
from megatron_chatflow.checkpoint.weight_map import huggingface_shapes

folder = Path(sys.argv[1])
shape = LlamaShape(
    num_layers=24, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8,
    num_query_groups=8, vocab_size=1000, max_position_embeddings=64, rotary_base=1e4,
    norm_epsilon=1e-5, init_method_std=0.02, untie_embeddings_and_output_weights=False,
)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

def convert(shape, name):
    shapes = huggingface_shapes(shape)
    (folder / name).mkdir()
    stream = ((name, torch.rand(size)) for name, size in shapes.items())
    write_shards(folder / name, shapes, torch.bfloat16, stream, 20_000_000)
    config = json.dumps(huggingface_config(shape, torch.bfloat16, {}))
    (folder / name / "config.json").write_text(config)
    import_huggingface(folder / name, folder / f"{name}_checkpoint")
    export_checkpoint(folder / f"{name}_checkpoint", folder / f"{name}_again")

values = {name: getattr(shape, name) for name in LlamaShape.__dataclass_fields__}
convert(LlamaShape(**{**values, "num_layers": 1}), "small")  # what the libraries take
before = peak()
convert(shape, "large")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")) / 1e6
    assert size > 120
    assert len(list((tmp_path / "large_again").glob("*.safetensors"))) == 1
    assert float(done.stdout) < 20

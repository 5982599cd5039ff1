"""Tests checkpoints whose state.json or config.yaml is well-formed but has impossible values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_shape import SHAPE

from megatron_chatflow.checkpoint.direct_file import hash_file
from megatron_chatflow.checkpoint.files import MANIFEST, manifest_text
from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.resize import resize_checkpoint
from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.verify import compare
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Creates a run's folder with one checkpoint."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {name: torch.ones(size) for name, size in huggingface_shapes(SHAPE).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(huggingface_config(SHAPE, torch.float32, {})))
    import_huggingface(source, tmp_path / "run")
    return tmp_path / "run"


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model is missing or not an object"),
        ({"model": [1]}, "model is missing or not an object"),
        ({"model": {"num_layers": "x"}}, "model.num_layers: must be a whole number, not 'x'"),
        ({"model": {"num_layers": 10**9}}, "num_layers: must be at most 10000, not 1000000000"),
        ({"model": {"num_attention_heads": 0}}, "num_attention_heads: must be at least 1, not 0"),
        ({"model": {"num_attention_heads": 3}}, "3 does not divide model.hidden_size 16"),
        ({"model": {"num_query_groups": 1.5}}, "num_query_groups: must be a whole number"),
        ({"model": {"rotary_base": float("nan")}}, "model.rotary_base: "),
        ({"model": {"rope_scaling_type": "zzz"}}, "model.rope_scaling_type: must be 'linear', "),
        ({"model": {"rope_scaling_type": "linear"}}, "one is set and the other is not"),
        ({"tokenizer": [1]}, "tokenizer is not an object"),
    ],
)
def test_states(run: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = run / "iter_0000000" / "state.json"
    state = json.loads(path.read_text())
    for name, value in change.items():
        state[name] = {**state[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(state))
    refused(lambda: export_checkpoint(run, tmp_path / "out"), f"state.json: .*{message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("model", None), ("tokenizer", [1]), ("iteration", "x"), ("guard", 3)]
)
def test_states_that_a_run_goes_on_from(run: Path, name: str, value: object) -> None:
    path = run / "iter_0000000" / "state.json"
    state = json.loads(path.read_text())
    RunState.read(path.parent)
    path.write_text(json.dumps({**state, name: value}))
    refused(lambda: RunState.read(path.parent), f"state.json: {name} is ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: 5", "model: must be a mapping of keys, not 5"),
        ("model: {max_position_embeddings: x}", "max_position_embeddings: must be a whole number"),
        ("model: {init_method_std: .nan}", "model.init_method_std: "),
        ("data: 5", "data: must be a mapping of keys, not 5"),
        ("data: {seq_length: x}", "data.seq_length: must be a whole number, not 'x'"),
        ("data: {sources: [1]}", "data.sources: must be a mapping of names"),
        ("data: {sources: {a: {paths: 1}}}", "data.sources.a.paths: must be a list"),
        ("tokenizer: x", "tokenizer: must be a mapping of keys, not 'x'"),
        ("tokenizer: {tokenizer_model: 1}", "tokenizer.tokenizer_model: must be a path"),
        ("- 1", "must be a mapping of keys"),
        ("a: !!timestamp 2001-13-45", "could not determine a constructor|month must be"),
        ("a: " + "[" * 3000, "is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_configurations(run: Path, tmp_path: Path, text: str, message: str) -> None:
    (run / "iter_0000000" / "config.yaml").write_text(text + "\n")
    refused(
        lambda: export_checkpoint(run, tmp_path / "out"),
        f"config.yaml: .*({message}).*restore the file or move it away",
    )
    assert not (tmp_path / "out").exists()


def test_configurations_of_other_versions(run: Path, tmp_path: Path) -> None:
    path = run / "iter_0000000" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["of_later"] = 1
    path.write_text("a: 2001-13-45\nlater: {x: [1]}\ndata:\n" + yaml.safe_dump(config))
    export_checkpoint(run, tmp_path / "out")
    path.unlink()
    export_checkpoint(run, tmp_path / "without")
    first, second = ((tmp_path / name / "config.json").read_text() for name in ("out", "without"))
    assert json.loads(first)["max_position_embeddings"] == 16
    # Only the removed file recorded the length.
    assert json.loads(second)["max_position_embeddings"] == 4096


@pytest.mark.parametrize("name", ["state.json", "config.yaml"])
def test_recorded_hashes_are_compared_by_every_reader(run: Path, tmp_path: Path, name: str) -> None:
    checkpoint = run / "iter_0000000"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    hashes = {path.relative_to(checkpoint).as_posix(): hash_file(path) for path in files}
    (checkpoint / MANIFEST).write_text(manifest_text(hashes))
    export_checkpoint(run, tmp_path / "whole")
    path = checkpoint / name
    path.write_text(path.read_text().replace("16", "32"))
    resize: Any = None  # never used
    for call in (
        lambda: export_checkpoint(run, tmp_path / "out"),
        lambda: resize_checkpoint(run, tmp_path / "out", resize),
        lambda: compare(tmp_path / "source", run, ["x"]),
    ):
        refused(call, f"is damaged: {name} .*load another checkpoint")

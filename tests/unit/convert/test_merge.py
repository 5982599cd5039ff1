"""Tests merged models: their values, their files, and what cannot be merged."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_shape import SHAPE
from tool_calls import call_tool

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.merge import merge_models
from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.errors import UserError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a Hugging Face folder with random weights."""

    def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        shape = replace(SHAPE, **changes)
        folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(len(name))
        tensors = {
            key: torch.randn(size, generator=generator).to(dtype)
            for key, size in huggingface_shapes(shape).items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = huggingface_config(shape, dtype, {})
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "generation_config.json").write_text('{"top_k": 7}', encoding="utf-8")
        return folder

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_is(folder: Path, expected: Callable[[str], torch.Tensor]) -> None:
    found = tensors(folder)
    assert list(found) and found.keys() == huggingface_shapes(SHAPE).keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected(name), rtol=1e-6, atol=1e-6)


def test_a_mean_of_folders_and_checkpoints(make: Make, tmp_path: Path) -> None:
    folders = make("a"), make("bb"), make("ccc")
    import_huggingface(folders[1], tmp_path / "run")
    values = [tensors(folder) for folder in folders]
    merge_models([folders[0], tmp_path / "run", folders[2]], tmp_path / "equal")
    assert_is(tmp_path / "equal", lambda name: sum(v[name] for v in values) / 3)
    # The first model is a checkpoint.
    merge_models([tmp_path / "run", folders[0]], tmp_path / "weighted", weights=[3, 1])
    assert_is(tmp_path / "weighted", lambda name: 0.75 * values[1][name] + 0.25 * values[0][name])


def test_task_vectors_are_added_to_the_base(make: Make, tmp_path: Path) -> None:
    base, one, two = make("base_"), make("a"), make("bb")
    v = {name: tensors(folder) for name, folder in (("base", base), ("one", one), ("two", two))}
    merge_models(
        [one, two], tmp_path / "sum", method="task_vectors", base=base, weights=[1.0, -0.5]
    )
    assert_is(
        tmp_path / "sum",
        lambda n: v["base"][n] + (v["one"][n] - v["base"][n]) - 0.5 * (v["two"][n] - v["base"][n]),
    )


def test_slerp_turns_from_one_to_the_other(make: Make, tmp_path: Path) -> None:
    one, two = make("a"), make("bb")
    first, second = tensors(one), tensors(two)
    merge_models([one, two], tmp_path / "arc", method="slerp", weights=[1, 3])

    def expected(name: str) -> torch.Tensor:
        a, b = first[name].double().flatten(), second[name].double().flatten()
        angle = math.acos(float(a @ b / (a.norm() * b.norm())))
        arc = (math.sin(0.25 * angle) * a + math.sin(0.75 * angle) * b) / math.sin(angle)
        return arc.reshape(first[name].shape).float()

    assert_is(tmp_path / "arc", expected)
    merge_models([one, one], tmp_path / "same", method="slerp")
    assert_is(tmp_path / "same", lambda name: first[name])


def test_small_files_and_dtype_are_those_of_the_first(make: Make, tmp_path: Path) -> None:
    half, full = make("a", torch.bfloat16), make("bb")
    merge_models([half, full], tmp_path / "out")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert (tmp_path / "out/generation_config.json").read_text() == '{"top_k": 7}'
    merge_models([half, full], tmp_path / "out32", dtype="fp32")
    assert json.loads((tmp_path / "out32/config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "--weights: 1 weights for 2 models"),
        ({"weights": [1.0, -1.0]}, "--weights: must not be negative, and not all zero"),
        ({"weights": [0.0, 0.0]}, "--weights: must not be negative, and not all zero"),
        ({"weights": [1.0, math.nan]}, "--weights: must be finite"),
        ({"method": "task_vectors"}, "--base: is missing, and --method is task_vectors"),
        ({"base": Path("x")}, "--base: is set, and --method is mean"),
        ({"dtype": "fp32", "models": ["a"]}, "--models: mean needs at least two models"),
        ({"method": "slerp", "models": ["a", "bb", "a"]}, "--models: slerp interpolates between"),
        ({"models": ["a", "wide"]}, "wide: ffn_hidden_size is 32, and 24 in"),
        ({"models": ["a", "absent"]}, "absent: folder not found"),
    ],
)
def test_what_cannot_be_merged(
    make: Make, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    make("a"), make("bb"), make("wide", ffn_hidden_size=32)
    models = [tmp_path / name for name in options.pop("models", ["a", "bb"])]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        merge_models(models, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_models_with_other_tokenizers(
    make: Make, tmp_path: Path, tiny_sentencepiece_model: Path, byte_level_model: Path
) -> None:
    one, two = make("a", vocab_size=600), make("bb", vocab_size=600)
    (one / "tokenizer.model").write_bytes(tiny_sentencepiece_model.read_bytes())
    (two / "tokenizer.json").write_bytes(byte_level_model.read_bytes())
    with pytest.raises(UserError, match="bb: has another tokenizer than .*/a"):
        merge_models([one, two], tmp_path / "out")


def test_the_command(make: Make, tmp_path: Path) -> None:
    make("a"), make("bb")
    models = ["--models", tmp_path / "a", tmp_path / "bb"]
    done = call_tool("merge_checkpoints.py", *models, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'out'}: 21 tensors")
    done = call_tool("merge_checkpoints.py", *models, "--output", tmp_path / "out")
    assert done.returncode == 2 and "--overwrite" in done.stderr
    done = call_tool("merge_checkpoints.py", *models, "--weights", "x", "--output", tmp_path / "b")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)

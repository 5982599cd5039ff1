"""Tests rotary scaling: transformers' frequencies and logits, and round trips of every spelling."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scaled_rope import KINDS, LLAMA3, SHAPE, folder_of

from megatron_chatflow.config import ModelConfig
from megatron_chatflow.config.load import load_config
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.shape import (
    LlamaShape,
    check_transformers,
    huggingface_config,
    shape_of_checkpoint,
    shape_of_config,
    shape_of_huggingface,
    trained_shape,
)
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.errors import UserError
from megatron_chatflow.model.rotary import Rotary

NO_TOKENIZER = TokenizerChoice(leave_out=True)


def theirs(folder: Path, length: int) -> torch.Tensor:
    """Returns the frequencies of transformers' model after it has seen ``length`` tokens."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    rotary(torch.zeros(1), torch.arange(length)[None])
    return rotary.inv_freq


def ours(shape: LlamaShape, length: int) -> torch.Tensor:
    model = ModelConfig(**vars(shape))
    return Rotary.of(model, length).inverse_frequencies(torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["rope_type", "type", "rope_parameters"])
def test_frequencies_are_those_of_transformers(kind: str, spelling: str, tmp_path: Path) -> None:
    if spelling == "rope_parameters":  # transformers 5
        parameters = {"rope_type": kind, **KINDS[kind], "rope_theta": 700.0}
        folder = folder_of(tmp_path / "hf", rope_parameters=parameters)
        content = json.loads((folder / "config.json").read_text())
        del content["rope_theta"], content["rope_scaling"]
        (folder / "config.json").write_text(json.dumps(content))
    else:
        folder = folder_of(tmp_path / "hf", rope_scaling={spelling: kind, **KINDS[kind]})
    shape = shape_of_huggingface(folder)
    assert shape.rope_scaling_type == kind
    plain = ours(replace(SHAPE, rotary_base=shape.rotary_base), 64)
    changed = []
    for length in (10, 64, 200):
        found = ours(shape, length)
        torch.testing.assert_close(found, theirs(folder, length), rtol=2e-6, atol=0)
        changed.append(not torch.allclose(found, plain, rtol=1e-3))
    assert changed == ([False, False, True] if kind == "dynamic" else [True] * 3)


# Values of published config.json files, and the cases that the formula treats separately.
YARN = {
    "qwen2.5": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "deepseek": {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 32},
    "gpt-oss": {"factor": 32.0, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
    "kimi": {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0},
    "given": {"factor": 8.0, "attention_factor": 0.8, "mscale": 2.0, "mscale_all_dim": 1.0},
    "from lengths": {"factor": None, "original_max_position_embeddings": 8192},
    "no scaling": {"factor": 1.0, "beta_fast": None, "mscale": 0},
}


@pytest.mark.parametrize("name", YARN)
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_yarn_is_that_of_transformers(name: str, base: float, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "yarn", "rope_theta": base, **YARN[name]}
    rope.setdefault("original_max_position_embeddings", 4096)
    shape = replace(SHAPE, hidden_size=512, max_position_embeddings=131072)  # heads of 128
    content = huggingface_config(shape, torch.float32, {})
    del content["rope_theta"], content["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps({**content, "rope_parameters": rope}))
    read = shape_of_huggingface(tmp_path)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    rotary = Rotary.of(ModelConfig(**vars(read)))
    torch.testing.assert_close(
        rotary.inverse_frequencies(torch.device("cpu")), theirs.inv_freq, rtol=2e-6, atol=0
    )
    assert rotary.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    # What is exported is read as the same model, here and by transformers.
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(read, torch.float32, {})))
    assert shape_of_huggingface(tmp_path) == replace(read, max_position_embeddings=read.longest)
    again = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(again.inv_freq, theirs.inv_freq)
    assert again.attention_scaling == theirs.attention_scaling


def test_a_length_beyond_that_of_yarn_is_kept() -> None:
    """With it, a window that only the longer of both lengths exceeds."""
    yarn = {"rope_scaling_type": "yarn", "rope_scaling_factor": 2.0}
    shape = replace(
        SHAPE,
        **yarn,
        max_position_embeddings=32768,
        rope_original_max_position_embeddings=8192,
        window_size=(19999, 0),
    )
    written = huggingface_config(shape, torch.float32, {})
    assert written["max_position_embeddings"] == 32768 and written["sliding_window"] == 20000
    read = shape_of_config(Path("config.json"), written)
    assert (read.longest, read.window) == (shape.longest, 20000) == (32768, shape.window)


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_keep_the_scaling(kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "hf", rope_scaling={"rope_type": kind, **KINDS[kind]})
    import_huggingface(folder, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf2", tokenizer=NO_TOKENIZER)
    one, other = (json.loads((tmp_path / k / "config.json").read_text()) for k in ("hf", "hf2"))
    if kind == "yarn":  # transformers 4 takes the factor from these lengths
        assert one.pop("max_position_embeddings") == 64
        length = other.pop("max_position_embeddings")
        assert length / other["rope_scaling"]["original_max_position_embeddings"] == 4.0
        assert shape_of_huggingface(tmp_path / "hf2").longest == length
    assert one == other
    before, after = (load_file(tmp_path / k / "model.safetensors") for k in ("hf", "hf2"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    import_huggingface(tmp_path / "hf2", tmp_path / "run2")
    first = (tmp_path / k / "iter_0000000" / "state.json" for k in ("run", "run2"))
    assert len({path.read_text() for path in first}) == 1


def test_versions_of_transformers_that_compute_another_yarn_are_refused() -> None:
    yarn = replace(SHAPE, rope_scaling_type="yarn", rope_scaling_factor=4.0)
    check_transformers("4.45.0", SHAPE)
    check_transformers("4.57.0.dev0", yarn)
    check_transformers("5.24.0", replace(SHAPE, window_size=(7, 0)))
    with pytest.raises(UserError, match="version 4.50.3 may compute YaRN"):
        check_transformers("4.50.3", yarn)
    with pytest.raises(UserError, match="version 4.52.4 may compute a sliding window"):
        check_transformers("4.52.4", replace(SHAPE, window_size=(7, 0)))


@pytest.mark.parametrize("name", ["mscale", "mscale_all_dim"])
def test_one_mscale_has_no_effect(name: str, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", **KINDS["yarn"], name: 0.7}
    folder = folder_of(tmp_path / "hf", rope_scaling=rope)
    flags = ["--load-hf", str(folder), "--train-iters", "1", "--micro-batch-size", "1"]
    flags += ["--global-batch-size", "1", "--lr", "1e-4", "--seq-length", "8"]
    config = load_config(None, [*flags, "--data-path", "a", "--tokenizer-model", "t"])
    assert config.model.mscale is config.model.mscale_all_dim is None
    import_huggingface(folder, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf2", tokenizer=NO_TOKENIZER)
    for text in (folder, tmp_path / "hf2"):
        torch.testing.assert_close(
            ours(shape_of_huggingface(text), 64), theirs(text, 64), rtol=2e-6, atol=0
        )


def test_a_run_trained_beyond_the_original_length_is_exported_with_its_base(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path / "hf", rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    import_huggingface(folder, tmp_path / "run")
    config = tmp_path / "run" / "iter_0000000" / "config.yaml"
    config.write_text(config.read_text() + "data: {seq_length: 160}\n")
    export_checkpoint(tmp_path / "run", tmp_path / "hf2", tokenizer=NO_TOKENIZER)
    shape = shape_of_huggingface(tmp_path / "hf2")
    assert shape.rope_scaling_type is None and shape.max_position_embeddings == 160
    # the frequencies that the run computed with
    trained = ours(shape_of_checkpoint(config.parent), 160)
    for length in (10, 160):
        torch.testing.assert_close(theirs(tmp_path / "hf2", length), trained, rtol=2e-6, atol=0)
    assert trained_shape(config.parent) == shape
    config.write_text(config.read_text().replace("160", "64"))
    assert trained_shape(config.parent).rope_scaling_type == "dynamic"


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"type": "longrope", "factor": 4.0},
            "of type 'longrope' is not supported; supported types are",
        ),
        ({"rope_type": "yarn", "factor": -1.0}, "type 'yarn' needs a positive factor, not -1.0"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": "1"}, "mscale must be a positive number"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 0}, "truncate must be true or false"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}, "beta_fast must not be below"),
        ({"rope_type": "linear"}, "type 'linear' needs a positive factor, not None"),
        ({"rope_type": "dynamic", "factor": "4"}, "type 'dynamic' needs a positive factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs a positive low_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 4.0},
            "low_freq_factor must be below high_freq_factor",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"full_attention": {"rope_type": "linear"}}, "by type of layer"),
    ],
)
def test_scaling_that_the_model_does_not_have(
    rope: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "hf", rope_scaling=rope)
    with pytest.raises(UserError, match=message) as caught:
        import_huggingface(folder, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    shutil.rmtree(folder)

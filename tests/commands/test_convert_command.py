"""Tests the command convert, with a Mistral that is like a LLaMA and with scaled rotary angles."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import run_tool
from scaled_rope import KINDS, folder_of

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.shape import (
    shape_of_huggingface,
)
from megatron_chatflow.errors import UserError

TEXTS = ("The river had risen.", "今天早上下了一场大雨")


def save_mistral(folder: Path, **changes: Any) -> Any:
    """Saves a random Mistral with a context of 64 tokens through transformers."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(5)
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }
    model = MistralForCausalLM(MistralConfig(**{**values, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model.eval()


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_tool("convert_checkpoint.py", *arguments)


@pytest.mark.parametrize(
    "changes",
    # The last has Mistral NeMo's property: head_dim is not 48 / 6.
    [{}, {"sliding_window": 64}, {"sliding_window": 11}, {"head_dim": 12}],
    ids=["plain", "window of the length", "window", "wide heads"],
)
def test_the_same_logits_there_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, MistralForCausalLM

    original = save_mistral(tmp_path / "hf", **changes)
    done = convert("import", "--hf", tmp_path / "hf", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    texts = [part for text in TEXTS for part in ("--text", text)]
    done = convert("verify", "--hf", tmp_path / "hf", "--checkpoint", tmp_path / "run", *texts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same model" in done.stdout and "logits: largest difference" in done.stdout
    done = convert("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert isinstance(exported, MistralForCausalLM)
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            exported(input_ids=ids).logits, original(input_ids=ids).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window is 0, not a number of tokens"),
        ({"sliding_window": "64"}, "sliding_window is '64'"),
        ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM is not supported"),
        ({"model_type": "llama"}, "architecture MistralForCausalLM is not supported"),
        ({"model_type": "mixtral"}, "architecture MistralForCausalLM is not supported"),
        ({"model_type": ["mistral"]}, "architecture .* is not supported"),
    ],
)
def test_what_is_none_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_mistral(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        shape_of_huggingface(tmp_path / "hf")


def test_its_own_defaults_hold(tmp_path: Path) -> None:
    save_mistral(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    del config["sliding_window"]  # transformers then assumes 4096
    config["max_position_embeddings"] = 4097
    path.write_text(json.dumps(config))
    assert shape_of_huggingface(tmp_path / "hf").window_size == (4095, 0)
    path.write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    assert shape_of_huggingface(tmp_path / "hf").window_size is None
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    path.write_text(
        json.dumps({**config, "max_position_embeddings": 4096, "rope_scaling": scaling})
    )
    assert shape_of_huggingface(tmp_path / "hf").window_size == (4095, 0)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_verify_compares_logits_under_scaling(kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "hf", rope_scaling={"rope_type": kind, **KINDS[kind]})
    import_huggingface(folder, tmp_path / "run")

    flags = ["--hf", folder, "--checkpoint", tmp_path / "run"]
    done = convert("verify", *flags, "--text", "the river rose " * 20)
    assert done.returncode == 0, done.stderr
    # Dynamic scaling has an effect only beyond the original length, which YaRN extends too.
    num_tokens = {"dynamic": 256, "yarn": 128}.get(kind, 64)
    assert f"over {num_tokens} tokens" in done.stdout and "same model" in done.stdout


def test_sizes_that_are_none_are_refused_in_one_line(tmp_path: Path) -> None:
    arguments = ["export", "--checkpoint", tmp_path, "--output", tmp_path / "x"]
    done = convert(*arguments, "--max-shard-size", "5 GX")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --max-shard-size: must be a size such as 5GB, 500MB or 2GiB, not '5 GX'\n"
    )

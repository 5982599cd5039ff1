"""Tests that out-of-range numbers give one short error line in every field."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chatflow.config import RunConfig, load_config
from megatron_chatflow.config.huggingface import CONFIG_NAMES, model_of_huggingface
from megatron_chatflow.errors import UserError

HUGE = [10**400, -(10**400), "1" + "0" * 5000, 2**63, -(2**63), "1e400", "1e999", ".inf", ".nan"]
BASE: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "max_position_embeddings": 64,
    },
    "tokenizer": {"tokenizer_model": "tokenizer.model"},
    "data": {"seq_length": 64, "sources": {"a": {"paths": ["a_text_document"]}}},
    "optimizer": {"lr": 1e-3},
    "train": {"train_iters": 10, "micro_batch_size": 1, "global_batch_size": 2},
    "checkpoint": {"from_scratch": True},
}
TYPES = typing.get_type_hints(RunConfig)
FIELDS = [
    (section.name, field.name)
    for section in dataclasses.fields(RunConfig)
    for field in dataclasses.fields(TYPES[section.name])
]


def is_short_line(error: UserError) -> bool:
    return len(str(error)) < 300 and "\n" not in str(error)


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(RunConfig)])
def test_huge_numbers_in_yaml(tmp_path: Path, section: str) -> None:
    path = tmp_path / "run.yaml"
    num_refused = 0
    for name in (name for of, name in FIELDS if of == section):
        for value in HUGE:
            content = {**BASE, section: {**BASE.get(section, {}), name: "VALUE"}}
            path.write_text(yaml.safe_dump(content).replace("VALUE", str(value)))
            try:
                load_config(path, [])
            except UserError as error:
                assert is_short_line(error), (name, str(error))
                num_refused += 1
    assert num_refused > 0


@pytest.mark.parametrize(
    "flag",
    ["--hidden-size", "--max-position-embeddings", "--distributed-timeout-minutes", "--lr"]
    + ["--train-iters", "--seq-length", "--global-batch-size", "--num-layers", "--seed"],
)
def test_huge_numbers_in_flags(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    for value in ("1" + "0" * 400, "1" + "0" * 5000, "1e400"):
        with pytest.raises(UserError) as caught:
            load_config(path, [flag, value])
        assert is_short_line(caught.value), str(caught.value)


@pytest.mark.parametrize("name", [*CONFIG_NAMES, "head_dim", "rope_theta", "sliding_window"])
def test_huge_numbers_in_a_models_config(tmp_path: Path, name: str) -> None:
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    for kind in ("llama", "mistral"):
        for value in (10**400, -(10**400), 2**63, "1" + "0" * 5000):
            text = json.dumps({**config, "model_type": kind, name: "VALUE"})
            (tmp_path / "config.json").write_text(text.replace('"VALUE"', str(value)))
            try:
                model_of_huggingface(tmp_path)
            except UserError as error:
                assert is_short_line(error), str(error)
            else:
                assert value == 2**63 or name == "sliding_window", value

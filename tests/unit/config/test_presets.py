"""Tests the table of architectures: published sizes, config.json of each family, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.config.architectures import ARCHITECTURES, PRESETS, architecture_of
from megatron_chatflow.config.huggingface import model_of_config
from megatron_chatflow.config.load import load_config
from megatron_chatflow.config.shape import num_parameters
from megatron_chatflow.config.validation import RunConfig
from megatron_chatflow.errors import UserError

PATH = Path("model/config.json")
# The vocabulary and the number of parameters of the published weights, tied ones counted once.
PUBLISHED = {
    "llama2-7b": (32_000, 6_738_415_616),
    "llama2-13b": (32_000, 13_015_864_320),
    "llama2-70b": (32_000, 68_976_648_192),
    "llama3-8b": (128_256, 8_030_261_248),
    "llama3.1-8b": (128_256, 8_030_261_248),
    "llama3.1-70b": (128_256, 70_553_706_496),
    "llama3.2-1b": (128_256, 1_235_814_400),
    "llama3.2-3b": (128_256, 3_212_749_824),
    "qwen2-0.5b": (151_936, 494_032_768),
    "qwen2-1.5b": (151_936, 1_543_714_304),
    "qwen2-7b": (152_064, 7_615_616_512),
    "qwen2-72b": (152_064, 72_706_203_648),
    "qwen2.5-0.5b": (151_936, 494_032_768),
    "qwen2.5-1.5b": (151_936, 1_543_714_304),
    "qwen2.5-3b": (151_936, 3_085_938_688),
    "qwen2.5-7b": (152_064, 7_615_616_512),
    "qwen2.5-14b": (152_064, 14_770_033_664),
    "qwen2.5-32b": (152_064, 32_763_876_352),
    "qwen2.5-72b": (152_064, 72_706_203_648),
    "qwen3-0.6b": (151_936, 596_049_920),
    "qwen3-1.7b": (151_936, 1_720_574_976),
    "qwen3-4b": (151_936, 4_022_468_096),
    "qwen3-8b": (151_936, 8_190_735_360),
    "qwen3-14b": (151_936, 14_768_307_200),
    "qwen3-32b": (151_936, 32_762_123_264),
    "mistral-7b-v0.1": (32_000, 7_241_732_096),
    "mistral-7b-v0.3": (32_768, 7_248_023_552),
}


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"tiny"}))
def test_published_models_have_their_published_size(config, preset: str) -> None:
    vocab_size, num = PUBLISHED[preset]
    assert num_parameters(config({"model": {"preset": preset}}).model, vocab_size) == num


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    values = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type].class_name],
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "sliding_window": None,
    }
    return {**values, **changes}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    values = config_of(model_type)
    for name in ("max_position_embeddings", "sliding_window", "num_key_value_heads"):
        del values[name]
    values["num_attention_heads"] = 32
    if model_type == "mistral":  # its own default of the window is shorter than that of the context
        values["sliding_window"] = None
    found = model_of_config(PATH, values)
    theirs: Any = AutoConfig.for_model(**{k: v for k, v in values.items() if k != "architectures"})
    assert found["max_position_embeddings"] == theirs.max_position_embeddings
    assert found["num_query_groups"] == theirs.num_key_value_heads
    assert found["norm_epsilon"] == theirs.rms_norm_eps
    assert found.get("kv_channels", 2) == (getattr(theirs, "head_dim", None) or 2)
    assert found["untie_embeddings_and_output_weights"] is not theirs.tie_word_embeddings
    assert found["rotary_base"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 2},
        {"layer_types": ["full_attention"] * 4},
    ],
)
def test_a_window_that_is_off_is_accepted(model_type: str, changes: dict[str, Any]) -> None:
    plain = model_of_config(PATH, config_of(model_type))
    assert model_of_config(PATH, config_of(model_type, **changes)) == plain
    assert (plain["add_qkv_bias"], plain["qk_layernorm"]) == (
        model_type == "qwen2",
        model_type == "qwen3",
    )


SLIDING = {"use_sliding_window": True, "sliding_window": 32}
HALF = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**SLIDING, "max_window_layers": 3}, "only 1 of 4 layers have a sliding window"),
        ({**SLIDING, "layer_types": HALF * 2}, "only 2 of 4 layers have a sliding window"),
        ({"layer_types": HALF * 2}, "layer_types has sliding_attention, and use_sliding_window"),
        ({"layer_types": HALF}, "layer_types must name one of"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types must name one of"),
        ({**SLIDING, "max_window_layers": "2"}, "max_window_layers must be a number"),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
            "architecture Qwen3MoeForCausalLM is not supported; supported architectures are "
            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architecture Qwen2ForCausalLM is not supp"),
    ],
)
def test_what_differs_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_of_config(PATH, {**config_of("qwen3"), **changes})
    assert "\n" not in str(caught.value)


def test_every_architecture_is_the_one_of_its_own_layers(config) -> None:
    for kind, found in ARCHITECTURES.items():
        switches = {"add_qkv_bias": found.add_qkv_bias, "qk_layernorm": found.qk_layernorm}
        named: dict[str, Any] = {f"model.{name}": value for name, value in switches.items()}
        if kind != "llama":
            named["model.window_size"] = (4095, 0)
        assert architecture_of(config(named).model) is found
        if kind != "mistral":  # without a window, it is a LLaMA
            assert architecture_of(config({**named, "model.window_size": None}).model) is found
    with pytest.raises(UserError, match="model.add_qkv_bias and model.qk_layernorm: both are set"):
        config({"model.add_qkv_bias": True, "model.qk_layernorm": True})


@pytest.mark.parametrize("window", [8, None])
def test_a_window_is_that_of_every_layer_for_transformers(window: int | None) -> None:
    from transformers import Qwen2Config

    content = {**config_of("qwen2"), "num_hidden_layers": 40}
    content |= ARCHITECTURES["qwen2"].window_fields(window, 40)
    for left_out in ([], ["max_window_layers"]):  # by default, windows begin at layer 28
        read = Qwen2Config(**{k: value for k, value in content.items() if k not in left_out})
        kind = "full_attention" if window is None else "sliding_attention"
        assert read.layer_types == [kind] * 40 and read.sliding_window == window


RUN = ["--train-iters", "1", "--micro-batch-size", "1", "--global-batch-size", "1", "--lr", "1e-4"]
RUN += ["--seq-length", "8", "--data-path", "a", "--tokenizer-model", "t"]


def test_none_removes_the_window_of_a_preset_or_is_refused(tmp_path: Path) -> None:
    preset = [*RUN, "--preset", "mistral-7b-v0.1"]
    assert load_config(None, preset).model.window_size == (4095, 0)
    without = load_config(None, [*preset, "--window-size", "none"])
    assert without.model.window_size is None
    assert RunConfig.from_dict(without.to_dict()) == without  # as a checkpoint records it
    (tmp_path / "config.json").write_text(json.dumps(config_of("mistral", sliding_window=16)))
    folder = [*RUN, "--load-hf", str(tmp_path)]
    assert load_config(None, folder).model.window_size == (15, 0)
    with pytest.raises(UserError, match=r"model.window_size: None differs from \(15, 0\) in"):
        load_config(None, [*folder, "--window-size", "none"])


def test_another_rotary_scaling_replaces_that_of_a_preset() -> None:
    preset = [*RUN, "--preset", "llama3.1-8b", "--rope-scaling-type"]
    yarn = ["yarn", "--rope-scaling-factor", "4", "--rope-original-max-position-embeddings", "8192"]
    model = load_config(None, [*preset, *yarn]).model
    assert (model.rope_scaling_type, model.rope_low_freq_factor) == ("yarn", None)
    assert (model.rope_scaling_factor, model.rotary_base) == (4.0, 500000.0)
    with pytest.raises(UserError, match="model.rope_scaling_factor"):  # not the preset's 8
        load_config(None, [*preset, "linear"])
    plain = load_config(None, [*preset, "none"]).model
    assert plain.rope_scaling_type is plain.rope_scaling_factor is None


def test_load_hf_refuses_another_rotary_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama", rope_scaling=rope)))
    with pytest.raises(UserError, match="model.rope_scaling_type: None differs from linear in"):
        load_config(None, [*RUN, "--load-hf", str(tmp_path), "--rope-scaling-type", "none"])


def test_load_hf_takes_the_layers_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen2")))
    flags = [*RUN, "--load-hf", str(tmp_path)]
    model = load_config(None, flags).model
    assert model.add_qkv_bias and not model.qk_layernorm and model.head_dim == 16
    with pytest.raises(UserError, match="model.add_qkv_bias: False differs from True in"):
        load_config(None, [*flags, "--no-add-qkv-bias"])
    with pytest.raises(UserError, match="model.kv_channels: 128 differs from None in"):
        load_config(None, [*flags, "--kv-channels", "128"])

"""Tests a whole configuration: presets, strictness, paths in messages, and the round trip."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.config import KnotConfig, RunConfig, RunLength, SourceConfig
from megatron_chatflow.config.architectures import PRESETS
from megatron_chatflow.config.yaml_file import parse_yaml
from megatron_chatflow.errors import UserError


def test_defaults_fill_what_is_left_out(config) -> None:
    run = config()
    assert run.parallel.tensor_model_parallel_size == 1
    assert run.train.seed == 1234
    assert run.data.sources["chat"].loss == "response"
    assert run.data.sources["chat"].validation_paths == ()
    assert run.data.schedule.knots[1] == KnotConfig(
        at=5000, weights={"english": 0.5, "chat": 0.5}, ramp="linear"
    )


def test_a_configuration_is_frozen(config) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().train.seed = 1


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_fills_the_shape(config, preset: str) -> None:
    model = config({"model": {"preset": preset}}).model
    assert {name: getattr(model, name) for name in PRESETS[preset]} == PRESETS[preset]


def test_what_is_given_is_stronger_than_the_preset(config) -> None:
    model = config({"model": {"preset": "llama2-7b", "num_layers": 2}}).model
    assert (model.num_layers, model.hidden_size) == (2, 4096)


def test_query_groups_follow_the_heads(config) -> None:
    shape = {**PRESETS["tiny"], "num_query_groups": None}
    assert config({"model": shape}).model.num_query_groups == 8
    changed = config({"model": {"preset": "tiny", "num_attention_heads": 16}}).model
    assert changed.num_query_groups == 16


def test_a_single_source_needs_no_schedule(config) -> None:
    run = config({"data.sources": {"only": {"paths": ["a"]}}, "data.schedule": None})
    assert run.data.schedule.knots == (KnotConfig(at=0, weights={"only": 1.0}),)


def test_length_in_samples_counts_whole_batches(config) -> None:
    run = config({"train.train_iters": None, "train.train_samples": "1.005K"})
    assert run.num_iterations == 125
    assert run.num_samples == 1000
    assert config().num_iterations == 100


def test_the_decay_ends_with_the_run_unless_told(config) -> None:
    assert RunLength.of(config()).lr_decay == 100
    assert RunLength.of(config({"optimizer.lr_decay_iters": 50})).lr_decay == 50


def test_iterations_count_whatever_their_size(config) -> None:
    run = config({"optimizer.lr_warmup_iters": 5, "train.global_batch_size": 16})
    length = RunLength.of(run, iteration=40, consumed_samples=320, initial_batch_size=8)
    assert (length.lr_warmup, length.lr_decay, length.last_iteration) == (5, 100, 100)
    assert length.lr_position(40, 320) == 40
    assert length.num_samples == 320 + 60 * 16


@pytest.mark.parametrize(
    "batch, remaining, end", [(16, 2, 64), (4, 8, 64), (12, 2, 56), (64, 0, 32)]
)
def test_samples_count_whatever_the_batch(config, batch: int, remaining: int, end: int) -> None:
    changes = {"train.train_iters": None, "train.train_samples": 64, "optimizer.lr_warmup_iters": 1}
    # Checks of the warmup are deferred until the checkpoint is known.
    changes["checkpoint.load"] = "a"
    run = config({**changes, "train.global_batch_size": batch, "train.micro_batch_size": 4})
    length = RunLength.of(run, iteration=4, consumed_samples=32, initial_batch_size=8)
    assert (length.lr_warmup, length.lr_decay) == (8, 64)
    assert length.lr_position(4, 32) == 32
    assert (length.last_iteration, length.num_samples) == (4 + remaining, end)


def test_learning_rate_in_samples(config) -> None:
    samples = {"train.train_iters": None, "train.train_samples": 1000}
    own = {"optimizer.lr_warmup_samples": 20, "optimizer.lr_decay_samples": "0.5K"}
    length = RunLength.of(config({**samples, **own}))
    assert (length.lr_warmup, length.lr_decay) == (20, 500)
    with pytest.raises(UserError, match=r"lr_warmup_samples: counts samples, .*lr_warmup_iters"):
        config(own)
    with pytest.raises(UserError, match=r"lr_decay_iters and optimizer.lr_decay_samples: both"):
        config({**samples, **own, "optimizer.lr_decay_iters": 10})
    with pytest.raises(
        UserError, match="lr_warmup_iters: 125, which is 1000 samples, is not below"
    ):
        config({**samples, "optimizer.lr_warmup_iters": 125})


def test_numbers_that_other_yaml_readers_take_for_text(config) -> None:
    assert config({"optimizer.lr": "3e-4"}).optimizer.lr == 3e-4


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modl", {}, "modl: unknown key (did you mean model?)"),
        ("model.num_layer", 3, "model.num_layer: unknown key (did you mean num_layers?)"),
        ("train.lr", 3, "train.lr: unknown key (did you mean optimizer.lr?)"),
        ("logging.zzz", 3, "logging.zzz: unknown key; known are log_interval, metrics_every"),
        ("data.sources.chat.pahts", [], "data.sources.chat.pahts: unknown key (did you mean paths"),
        (
            "data.schedule.knots.0.rmp",
            "x",
            "data.schedule.knots[0].rmp: unknown key (did you mean ",
        ),
        ("model.preset", "llama-7b", "model.preset: there is no 'llama-7b' (did you mean llama2-"),
        ("model", 3, "model: must be a mapping of keys, not 3"),
        ("model", None, "model.num_layers: is missing (number of transformer layers)"),
        ("train.seed", "3", "train.seed: must be a whole number, not '3'"),
        ("train.seed", True, "train.seed: must be a whole number, not True"),
        ("train.seed", 3.0, "train.seed: must be a whole number, not 3.0"),
        ("train.seed", -1, "train.seed: must be at least 0, not -1"),
        ("train.train_iters", "3", "train.train_iters: must be a number, not the text '3'"),
        ("train.train_iters", True, "train.train_iters: must be a count such as"),
        ("train.train_iters", 0, "train.train_iters: must be at least 1, not 0"),
        ("train.bf16", "yes", "train.bf16: must be true or false, not 'yes'"),
        ("train.bf16", 1, "train.bf16: must be true or false, not 1"),
        ("data.seq_length", "4K", "data.seq_length: must be a whole number, not '4K'"),
        ("optimizer.lr", "3", "optimizer.lr: must be a number, not '3'"),
        ("optimizer.lr", True, "optimizer.lr: must be a number, not True"),
        ("optimizer.lr", float("nan"), "optimizer.lr: must be above 0, not nan"),
        ("optimizer.lr", float("inf"), "optimizer.lr: "),
        (
            "optimizer.lr",
            None,
            "optimizer.lr: is missing (maximum learning rate, reached at the end of the warmup)",
        ),
        ("optimizer.adam_beta1", 1, "optimizer.adam_beta1: must be below 1"),
        ("optimizer.lr_decay_style", "cos", "optimizer.lr_decay_style: must be 'cosine', 'linear'"),
        ("data.sources", {}, "data.sources: must not be empty"),
        ("data.sources.chat", "a", "data.sources.chat: must be a mapping of keys, not 'a'"),
        ("data.sources.chat.paths", "a", "data.sources.chat.paths: must be a list, not 'a'"),
        ("data.sources.chat.paths", [], "data.sources.chat.paths: must not be empty"),
        ("data.sources.chat.paths", [3], "data.sources.chat.paths[0]: must be a path, not 3"),
        ("data.sources", {3: {"paths": ["a"]}}, "data.sources[3]: must be text; quote it, not 3"),
        ("data.sources", {"a\nb": {"paths": ["a"]}}, "data.sources.a\\nb: must be a name"),
        ("data.schedule", None, "data.schedule: is missing (weights of the sources over the run)"),
        ("data.schedule.knots", [], "data.schedule.knots: must not be empty"),
        ("data.schedule.knots.0.at", -1, "data.schedule.knots[0].at: must be at least 0"),
        ("data.schedule.unit", "steps", "data.schedule.unit: must be 'samples', 'tokens' or"),
        ("checkpoint.save", "", "checkpoint.save: must be a path, not ''"),
        ("checkpoint.save", "a\0b", "checkpoint.save: must be a path"),
        ("checkpoint.save", "gs://b/run", "checkpoint.save: gs://b/run: is a URL, and only local"),
        ("data.sources.chat.paths", ["s3:/b/a"], "data.sources.chat.paths[0]: s3:/b/a: is a URL"),
        ("checkpoint.load", "ftp://b/a", "checkpoint.load: ftp://b/a: ftp:// is not supported"),
        ("tokenizer.tokenizer_model", "https://h/t.json", "tokenizer.tokenizer_model: https://h/t"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(config, path, value, message) -> None:
    with pytest.raises(UserError) as caught:
        config({path: value})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_endless_value_is_refused_and_not_printed(config) -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    with pytest.raises(UserError) as caught:
        config({"data.sources.chat.paths": cycle})
    assert len(str(caught.value)) < 300


def test_making_a_section_in_python_is_as_strict() -> None:
    with pytest.raises(ValueError, match="max_epochs"):
        SourceConfig(paths=("a",), max_epochs=0)


names = st.text(min_size=1, max_size=12).filter(lambda name: name.strip() and name.isprintable())
paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda path: path.strip() and not path.startswith("~")
)


@settings(max_examples=40)
@given(
    weights=st.dictionaries(
        names, st.floats(min_value=0, allow_nan=False, allow_infinity=False), min_size=2
    ).filter(lambda weights: any(weights.values())),
    path=paths,
    lr=st.floats(min_value=1e-300, max_value=1e3),
    samples=st.integers(8, 2**62),
)
def test_yaml_reads_back_exactly(weights, path, lr, samples) -> None:
    run = RunConfig.from_dict(
        {
            "model": {"preset": "tiny"},
            "tokenizer": {"tokenizer_model": path},
            "data": {
                "seq_length": 64,
                "sources": {name: {"paths": [path]} for name in weights},
                "schedule": {"knots": [{"at": samples, "weights": weights}]},
            },
            "optimizer": {"lr": lr},
            "train": {"train_samples": samples, "micro_batch_size": 1, "global_batch_size": 8},
        }
    )
    again = RunConfig.from_dict(parse_yaml(run.to_yaml(), "run"))
    assert again == run
    assert again.to_yaml() == run.to_yaml()
    assert list(again.data.sources) == list(run.data.sources)


def test_to_dict_is_plain_and_complete(config) -> None:
    plain = config({"checkpoint.save": "runs/a"}).to_dict()
    assert plain["checkpoint"]["save"] == "runs/a"
    assert plain["data"]["sources"]["chat"]["paths"] == ["data/chat_messages_document"]
    assert plain["train"]["eval_interval"] is None
    assert RunConfig.from_dict(plain) == config({"checkpoint.save": Path("runs/a")})


def test_a_path_in_the_home_folder_is_spelt_out(config) -> None:
    assert config({"checkpoint.save": "~/run"}).checkpoint.save == Path.home() / "run"

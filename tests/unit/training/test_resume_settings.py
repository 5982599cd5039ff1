"""Tests settings that a resume may change: the seed only if allowed, all others from one table."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_run import TinyRun, write_checkpoint_state

from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.data.permutation import SampleOrder
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.table import format_table
from megatron_chatflow.training.dry_run import dry_run
from megatron_chatflow.training.inputs import RunInputs, open_inputs


def _resume(make_config, folder: Path, **changes: Any) -> RunInputs:
    return open_inputs(make_config(checkpoint__load=str(folder), **changes))


def _changes(inputs: RunInputs) -> dict[str, tuple[Any, Any, Any]]:
    return {
        str(row["setting"]): (row["checkpoint"], row["now"], row["consequence"])
        for row in inputs.changes
    }


def test_another_seed_is_refused(make_config, tmp_path: Path) -> None:
    write_checkpoint_state(make_config(), tmp_path)
    with pytest.raises(UserError, match=r"train\.seed: 7 here and 1234 in .* --new-data-seed"):
        _resume(make_config, tmp_path, train__seed=7)
    inputs = _resume(make_config, tmp_path)
    assert inputs.state.data_seeds == {"first": [[0, 1234]], "second": [[0, 1234]]}


def test_another_seed_is_taken_from_the_next_epoch_on(make_config, tmp_path: Path) -> None:
    write_checkpoint_state(make_config(), tmp_path)
    before = _resume(make_config, tmp_path)
    after = _resume(make_config, tmp_path, train__seed=7, train__new_data_seed=True)
    other = open_inputs(make_config(train__seed=7))
    for was, now, new in zip(before.sources, after.sources, other.sources, strict=True):
        assert after.state.data_seeds[was.name] == [[0, 1234], [1, 7]]
        size = was.num_samples
        epochs = np.arange(size), np.arange(size, 2 * size)
        np.testing.assert_array_equal(now.ordinals(epochs[0]), was.ordinals(epochs[0]))
        np.testing.assert_array_equal(now.ordinals(epochs[1]), new.ordinals(epochs[1]))
        assert (now.ordinals(epochs[1]) != was.ordinals(epochs[1])).any()
        # Each epoch contains every sample once.
        assert sorted(now.ordinals(epochs[1])) == sorted(epochs[0])
    assert _changes(after) == {
        "train.seed": ("1234", "7", "applies from the next epoch of each source")
    }


def test_a_changed_seed_stays_with_the_run(make_config, tmp_path: Path) -> None:
    seeds = {"first": [[0, 1234], [1, 7]], "second": [[0, 1234], [1, 7]], "gone": [[0, 1]]}
    write_checkpoint_state(make_config(train__seed=7), tmp_path, data_seeds=seeds)
    assert _resume(make_config, tmp_path, train__seed=7).state.data_seeds == seeds
    with pytest.raises(UserError, match="1234 here and 7 in"):
        _resume(make_config, tmp_path)
    # The old seed is restored before the next epoch, so nothing has changed.
    back = _resume(make_config, tmp_path, train__new_data_seed=True).state.data_seeds
    assert back == {"first": [[0, 1234]], "second": [[0, 1234]], "gone": [[0, 1]]}
    third = _resume(make_config, tmp_path, train__seed=9, train__new_data_seed=True)
    assert third.state.data_seeds["first"] == [[0, 1234], [1, 9]]


def test_a_source_that_was_never_drawn_from_takes_the_seed_at_once(
    make_config, tiny_run: TinyRun, tmp_path: Path
) -> None:
    write_checkpoint_state(make_config(), tmp_path)
    sources = make_config().to_dict()["data"]["sources"]
    sources["third"] = {"paths": [str(tiny_run.folder / "first_text_document")]}
    knots = make_config().to_dict()["data"]["schedule"]["knots"]
    knots.append({"at": 72, "weights": {"first": 1, "third": 1}})
    inputs = _resume(
        make_config,
        tmp_path,
        data__sources=sources,
        data__schedule={"knots": knots},
        train__seed=7,
        train__new_data_seed=True,
    )
    assert inputs.state.data_seeds["third"] == [[0, 7]]
    shown = _changes(inputs)
    assert shown["data.sources.third"][1:] == ("added", "first drawn from at sample 72")
    assert shown["data.schedule"] == (
        "2 knots in samples",
        "3 knots in samples",
        "edited at sample 40",
    )


@pytest.mark.parametrize("has_config", [True, False])
def test_checkpoints_of_earlier_versions(
    make_config, tmp_path: Path, caplog: pytest.LogCaptureFixture, has_config: bool
) -> None:
    """They record the seed only in config.yaml, which may have been removed."""
    write_checkpoint_state(make_config(), tmp_path)
    folder = iteration_folder(tmp_path, 5)
    state = json.loads((folder / "state.json").read_text())
    del state["data_seeds"]
    (folder / "state.json").write_text(json.dumps(state))
    if has_config:
        recorded = yaml.safe_load((folder / "config.yaml").read_text())
        del recorded["train"]["new_data_seed"], recorded["optimizer"]["lr_warmup_init"]
        (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
        with pytest.raises(UserError, match="7 here and 1234 in"):
            _resume(make_config, tmp_path, train__seed=7)
        assert not _changes(_resume(make_config, tmp_path))
        changed = _resume(make_config, tmp_path, optimizer__lr_warmup_init=1e-5)
        assert _changes(changed)["optimizer.lr_warmup_init"][:2] == ("0.0", "1e-05")
    else:
        (folder / "config.yaml").unlink()
        with caplog.at_level(logging.WARNING):
            inputs = _resume(make_config, tmp_path, train__seed=7)
        assert inputs.state.data_seeds["first"] == [[0, 7]]
        assert "does not record a seed" in caplog.text and "has no config.yaml" in caplog.text


def test_nothing_is_listed_where_nothing_changed(make_config, tmp_path: Path) -> None:
    write_checkpoint_state(make_config(), tmp_path)
    assert not _resume(make_config, tmp_path).changes
    assert "settings that differ" not in dry_run(make_config(checkpoint__load=str(tmp_path)))


def test_an_edited_schedule_is_reported_once(
    make_config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint_state(make_config(), tmp_path)
    knots = [{"at": 48, "weights": "as_planned"}, {"at": 64, "weights": {"second": 1}}]
    with caplog.at_level(logging.INFO):
        text = dry_run(make_config(checkpoint__load=str(tmp_path), data__schedule__knots=knots))
    assert (text + caplog.text).count("schedule edited at sample") == 1


def test_every_changed_setting_is_listed_with_its_consequence(make_config, tmp_path: Path) -> None:
    write_checkpoint_state(make_config(optimizer__min_lr=3e-4), tmp_path)
    changes = {
        "optimizer__lr": 1e-3,
        "optimizer__min_lr": 3e-4,
        "train__global_batch_size": 16,
        "train__train_iters": 12,
        "train__eval_interval": 2,
        "data__sources__first__boundaries": "isolate",
        "checkpoint__save": "runs/" + "a" * 50 + "/chatflow",
    }
    inputs = _resume(make_config, tmp_path, **changes)
    rate = "learning rate of iteration 6: 0.0007954 instead of 0.001884"
    assert _changes(inputs) == {
        "optimizer.lr": ("0.003", "0.001", rate),
        "train.train_iters": ("10", "12", "7 iterations are left, up to sample 152"),
        "train.global_batch_size": (
            "8",
            "16",
            "validation reads up to 16 samples per source",
        ),
        "train.eval_interval": ("5", "2", ""),
        "data.sources.first.boundaries": (
            "ignore",
            "isolate",
            "attention sees other tokens from now on",
        ),
        "checkpoint.save": ("-", "runs/aaaaaaaaaaaaa...aaaaaaaaaa/chatflow", ""),
    }
    text = dry_run(make_config(checkpoint__load=str(tmp_path), **changes))
    assert format_table(inputs.changes) in text
    assert all(len(line) <= 200 for line in format_table(inputs.changes).splitlines())


@pytest.mark.parametrize(
    ("before", "changes", "consequence"),
    [
        ({}, {"lr_warmup_init": 1e-4}, None),  # the warmup is over
        ({"lr_warmup_iters": 8}, {"lr_warmup_init": 1e-4}, "learning rate of iteration 6: 0.0019"),
        ({}, {"decoupled_lr": 1e-3}, "embedding and output layer have another learning rate from"),
        (
            {"decoupled_lr": 1e-3},
            {"decoupled_lr": 1e-3, "decoupled_min_lr": 1e-5},
            "embedding and output layer have another learning rate from now on",
        ),
        ({}, {"weight_decay": 0.2}, "another weight decay from now on"),
        ({}, {"no_weight_decay": ["embeddings"]}, "other tensors have weight decay from now on"),
        ({}, {"ema_decay": 0.9}, "the average starts at the weights of the checkpoint"),
        ({"ema_decay": 0.9}, {}, "the average ends here"),
        ({"ema_decay": 0.9}, {"ema_decay": 0.99}, "the average moves at another speed from now on"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2},
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3},
            "learning rate of iteration 9: 0.001762 instead of 0.003",
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3},
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_wsd_decay_style": "linear"},
            "learning rate of iteration 9: 0.002 instead of 0.001762",
        ),
    ],
)
def test_changes_of_the_optimizer_have_consequences(
    make_config,
    tmp_path: Path,
    before: dict[str, Any],
    changes: dict[str, Any],
    consequence: str | None,
) -> None:
    def optimizer(settings: dict[str, Any]) -> dict[str, Any]:
        return {f"optimizer__{name}": value for name, value in settings.items()}

    write_checkpoint_state(make_config(**optimizer(before)), tmp_path)
    kept = {name: value for name, value in before.items() if name.startswith("lr_warmup")}
    inputs = _resume(make_config, tmp_path, **optimizer({**kept, **changes}))
    [(_, _, shown)] = _changes(inputs).values()
    assert shown.startswith(consequence) if consequence else shown == ""


def test_a_precision_changes_losses_by_rounding(make_config, tmp_path: Path) -> None:
    write_checkpoint_state(make_config(), tmp_path)
    inputs = _resume(make_config, tmp_path, train__transformer_impl="local")
    shown = {name: text for name, (_, _, text) in _changes(inputs).items()}
    assert shown == {"train.transformer_impl": "losses change by rounding errors"}


def test_the_first_rate_that_differs_is_found_in_a_run_of_any_length(
    make_config, tmp_path: Path
) -> None:
    style = {"optimizer__lr_decay_style": "WSD", "train__train_iters": 10**11}
    write_checkpoint_state(make_config(**style, optimizer__lr_wsd_decay_iters=10**10), tmp_path)
    inputs = _resume(make_config, tmp_path, **style, optimizer__lr_wsd_decay_iters=2 * 10**10)
    (text,) = (text for _, _, text in _changes(inputs).values())
    # The rate is the same to rounding at first.
    number = int(text.split()[4].rstrip(":").replace(",", ""))
    assert text.startswith("learning rate of iteration ")
    assert 8 * 10**10 < number < 8 * 10**10 + 1000


def test_the_order_follows_later_seeds() -> None:
    order = SampleOrder(1, "source", 50, later_seeds=[(2, 5), (3, 8)])
    for epoch, seed in enumerate([1, 1, 5, 8, 8]):
        places = np.arange(50 * epoch, 50 * (epoch + 1))
        expected = SampleOrder(seed, "source", 50).ordinals(places)
        np.testing.assert_array_equal(order.ordinals(places), expected)

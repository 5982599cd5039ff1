"""Tests steps whose global batch has no loss token: no update is made, and no fault is counted."""

import re
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import yaml
from test_faults import are_equal
from tiny_run import VOCAB_SIZE, TinyRun

from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.data.sidecar import loss_mask_prefix

PROMPT_TOKENS, ANSWER_TOKENS = 470, 42
SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {
    "dp2": ["--on-nan", "skip", "--micro-batch-size", "1"],
    "dp2_sharded": ["--on-nan", "skip", "--micro-batch-size", "1", *SHARDED],
    "tp2": ["--on-nan", "stop", "--tensor-model-parallel-size", "2"],
    "pp2": ["--on-nan", "rollback", "--pipeline-model-parallel-size", "2"],
}


@pytest.fixture(scope="module")
def config(tiny_run: TinyRun) -> Path:
    """Configures long masked prompts and short answers.

    Most samples of 64 tokens have no loss token.
    """
    folder = tiny_run.folder / "no_loss_tokens"
    folder.mkdir()
    rng = np.random.default_rng(5)
    tokens = IndexedDatasetWriter(folder / "chat_text_document", np.uint16)
    masks = IndexedDatasetWriter(loss_mask_prefix(folder / "chat_text_document"), np.uint8)
    for _ in range(40):
        length = PROMPT_TOKENS + ANSWER_TOKENS
        tokens.add_document(rng.integers(3, VOCAB_SIZE, length).astype(np.uint16))
        masks.add_document((np.arange(length) >= PROMPT_TOKENS).astype(np.uint8))
    tokens.finalize()
    masks.finalize()
    values: dict[str, Any] = yaml.safe_load(tiny_run.config.read_text())
    source = {"paths": [str(folder / "chat_text_document")], "loss": "response"}
    values["data"]["sources"] = {"chat": source}
    values["data"]["schedule"] = {"knots": [{"at": 0, "weights": {"chat": 1}}]}
    values["train"] |= {"train_iters": 12, "micro_batch_size": 1, "global_batch_size": 1}
    values["train"]["eval_interval"] = None
    values["faults"] = {"max_bad_steps": 2, "loss_spike_factor": 3}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def assert_only_steps_with_loss_tokens_update(folder: Path) -> list[bool]:
    """Compares the metrics and checkpoints of a run. Returns which steps had loss tokens."""
    entries, _ = jobs.read_metrics(folder)
    has_tokens = [entry["sources"]["chat"]["loss_tokens"] > 0 for entry in entries]
    assert any(has_tokens) and not all(has_tokens)
    assert [entry["lm_loss"] is not None for entry in entries] == has_tokens
    skipped = np.cumsum(np.logical_not(has_tokens)).tolist()
    assert [entry["skipped_no_loss_tokens"] for entry in entries] == skipped
    assert all(entry["num_skipped"] == entry["num_rollbacks"] == 0 for entry in entries)
    for iteration, updates in enumerate(has_tokens[1:], 2):
        assert are_equal(folder, iteration - 1, iteration) != updates, iteration
    return has_tokens


@pytest.mark.distributed
def test_weights_and_moments_stay_and_the_step_is_counted(config: Path, tmp_path: Path) -> None:
    flags = ["--config", config, "--save-interval", 1]
    output = jobs.run(jobs.pretrain(*flags, "--save", tmp_path / "whole"))
    has_tokens = assert_only_steps_with_loss_tokens_update(tmp_path / "whole")
    assert not re.search(r"\bnan\b", output, re.IGNORECASE)
    lines = [line for line in output.splitlines() if "  no loss tokens  " in line]
    assert len(lines) == has_tokens.count(False)

    resumed = jobs.pretrain(*flags, "--save", tmp_path / "parts", "--load", tmp_path / "parts")
    jobs.run([*resumed, "--exit-interval", 5])
    jobs.run(resumed)
    whole, parts = (jobs.read_metrics(tmp_path / name)[0] for name in ("whole", "parts"))
    names = ("lm_loss", "learning_rate", "grad_norm", "skipped_no_loss_tokens")
    assert [[e[name] for name in names] for e in parts] == [[e[n] for n in names] for e in whole]

    # Neither the samples nor the learning rate depend on which steps had loss tokens.
    values = yaml.safe_load(config.read_text())
    values["data"]["sources"]["chat"]["loss"] = "all"
    every = tmp_path / "every.yaml"
    every.write_text(yaml.safe_dump(values))
    jobs.run(jobs.pretrain("--config", every, "--save", tmp_path / "every"))
    names = ("consumed_samples", "learning_rate")
    found, expected = (jobs.read_metrics(tmp_path / name)[0] for name in ("whole", "every"))
    assert [[e[n] for n in names] for e in found] == [[e[n] for n in names] for e in expected]


@pytest.mark.slow
@pytest.mark.distributed
def test_at_any_layout(config: Path, tmp_path: Path) -> None:
    flags = ["--config", config, "--global-batch-size", 2, "--save-interval", 1]
    single = [[*flags, "--micro-batch-size", 2, "--save", tmp_path / "single"]]
    jobs.run_layouts(1, single, tmp_path)  # type: ignore[arg-type]
    tasks = [[*flags, *extra, "--save", tmp_path / name] for name, extra in LAYOUTS.items()]
    jobs.run_layouts(2, tasks, tmp_path)  # type: ignore[arg-type]
    expected = jobs.read_metrics(tmp_path / "single")[0]
    for name in ("single", *LAYOUTS):
        assert_only_steps_with_loss_tokens_update(tmp_path / name)
        found = jobs.read_metrics(tmp_path / name)[0]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=2e-4)


@pytest.mark.distributed
def test_bf16_weights_and_master_weights_stay(config: Path, tmp_path: Path) -> None:
    flags = ["--config", config, "--save-interval", 1, "--bf16", "--use-distributed-optimizer"]
    jobs.run(jobs.pretrain(*flags, "--save", tmp_path, "--log-straggler"))
    assert_only_steps_with_loss_tokens_update(tmp_path)

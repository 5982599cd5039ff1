"""Tests runs whose weights are shares of loss tokens: the plan, the dry run and resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_run import TinyRun, write_checkpoint_state, write_dataset
from tool_calls import call_tool

from megatron_chatflow.config import RunConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer
from megatron_chatflow.training.dry_run import dry_run
from megatron_chatflow.training.inputs import open_inputs


def values_of(tiny_run: TinyRun, folder: Path | None = None) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
    values["data"]["schedule"]["count"] = "loss_tokens"
    values["train"]["train_iters"] = 400
    if folder is not None:
        values["checkpoint"] = {"load": str(folder), "save": str(folder)}
    return values


def test_the_dry_run_and_the_plan_show_shares_of_loss_tokens(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    values = values_of(tiny_run)
    config = RunConfig.from_dict(values)
    text = dry_run(config)
    assert "loss tokens per epoch" in text and "of loss tokens" in text
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = call_tool("plan_blend.py", "--config", path)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("64 to 3,200")]
    # The last knot has the shares 0.2 and 0.8. Packed samples have fewer loss tokens than windows.
    assert [float(row[6].rstrip("%")) for row in rows] == pytest.approx([20, 80], abs=0.1)
    assert float(rows[1][5].rstrip("%")) > 80
    values["data"]["sources"]["first"]["paths"] = [str(tmp_path / "missing")]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = call_tool("plan_blend.py", "--config", path)
    assert done.returncode == 2 and "missing" in done.stderr


def test_a_resume_keeps_what_weights_count(tiny_run: TinyRun, tmp_path: Path) -> None:
    values = values_of(tiny_run, tmp_path)
    config = RunConfig.from_dict(values)
    write_checkpoint_state(config, tmp_path)
    begun, resumed = (
        open_inputs(replace(config, checkpoint=replace(config.checkpoint, load=None, save=None))),
        open_inputs(config),
    )
    assert resumed.blend.edit is None and not resumed.changes
    for ours, theirs in zip(resumed.blend.take(0, 500), begun.blend.take(0, 500), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    values["data"]["schedule"]["count"] = "samples"
    with pytest.raises(UserError) as caught:
        open_inputs(RunConfig.from_dict(values))
    assert str(caught.value).startswith("data.schedule.count: samples here and loss_tokens in the")
    values = values_of(tiny_run, tmp_path)
    values["data"]["sources"]["first"]["boundaries"] = "isolate"
    with pytest.raises(UserError) as caught:
        open_inputs(RunConfig.from_dict(values))
    assert str(caught.value).startswith("data.sources.first: has ")
    assert "restore loss and boundaries of the source" in str(caught.value)


def test_another_vocabulary_changes_what_weights_count(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The data of the larger vocabulary has other numbers of tokens."""
    folder = tmp_path / "run"
    values = values_of(tiny_run, folder)
    write_checkpoint_state(RunConfig.from_dict(values), folder)
    old = load_tokenizer(tiny_run.tokenizer_model)
    larger = extend_tokenizer(old, ["\u9f8d"], tmp_path / "larger")
    values["tokenizer"] = {
        "tokenizer_model": str(larger.model_path),
        "old_tokenizer_model": str(tiny_run.tokenizer_model),
    }
    values["checkpoint"]["embedding_init"] = "mean"
    assert open_inputs(RunConfig.from_dict(values)).grown is not None  # with the same tokens
    prefix = tmp_path / "first_text_document"
    write_dataset(prefix, tiny_run.tokenizer_model, seed=2, num_documents=300)
    values["data"]["sources"]["first"]["paths"] = [str(prefix)]
    with pytest.raises(UserError) as caught:
        open_inputs(RunConfig.from_dict(values))
    assert str(caught.value).startswith("data.schedule.count: loss_tokens, which the new tokenizer")
    assert "start a new run with --finetune" in str(caught.value)

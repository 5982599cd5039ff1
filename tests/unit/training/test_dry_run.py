"""Tests that a dry run opens all inputs, trains nothing, and describes the run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_run import TinyRun, write_checkpoint_state

from megatron_chatflow.config.memory import offloaded_bytes
from megatron_chatflow.config.shape import num_parameters
from megatron_chatflow.convert.shape import LlamaShape, huggingface_config
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.errors import UserError
from megatron_chatflow.simulate.layout_search import describe_step
from megatron_chatflow.training.dry_run import dry_run
from megatron_chatflow.training.inputs import open_inputs


def test_it_shows_configuration_blend_epochs_and_sizes(make_config) -> None:
    text = dry_run(make_config(), verbose=True)
    assert "resolved configuration:\nmodel:" in text
    assert "10 iterations of 8 samples of 64 tokens; starts fresh" in text
    assert "0 to 64" in text and "64 to 80" in text
    assert "600 tokens in the vocabulary, padded to 640 rows" in text
    assert "1 processes" in text


def test_work_is_that_of_the_stages(make_config) -> None:
    def work(**changes: Any) -> tuple[str, float]:
        text = dry_run(make_config(**changes))
        found = re.search(r"^(\S+(?: to \S+)?) GFLOP per token, (\S+) FLOP per process", text, re.M)
        assert found is not None
        return found[1], float(found[2])

    per_token, total = work()
    stages = [{"at": 0, "trainable": ["output"]}, {"at": 16, "trainable": ["all"]}]
    both, less = work(train__stages=stages)
    few, all_of_them = both.split(" to ")
    assert all_of_them == per_token and float(few) < 0.75 * float(per_token)
    # Two of ten iterations leave out every weight gradient except that of the output layer.
    frozen = num_parameters(make_config().model, 600) - 600 * 64
    assert total - less == pytest.approx(2 * frozen * 16 * 64, rel=2e-2)
    assert work(train__stages=[{"at": 0, "trainable": ["output"]}])[0] == few


def test_an_offloaded_optimizer_needs_host_memory_and_has_no_predicted_speed(make_config) -> None:
    changes = {
        "parallel__use_distributed_optimizer": True,
        "optimizer__use_precision_aware_optimizer": True,
        "optimizer__optimizer_cpu_offload": True,
        "train__bf16": True,
    }
    config = make_config(**changes)
    vocab_size = 600
    whole = offloaded_bytes(config, vocab_size, 1)
    half = make_config(**changes, optimizer__optimizer_offload_fraction=0.5)
    assert 0 < whole == pytest.approx(2 * offloaded_bytes(half, vocab_size, 1), rel=1e-6)
    # fp32 weights, two moments and a gradient of every parameter, on one of two ranks.
    num = num_parameters(config.model, vocab_size)
    assert offloaded_bytes(config, vocab_size, 2) == pytest.approx(16 * num / 2, rel=0.05)
    text = dry_run(config, describe_step=describe_step)
    assert "host memory per process for offloaded state: 0.0" in text
    assert "predicted for" not in text
    assert offloaded_bytes(make_config(), vocab_size, 1) == 0


def test_probes_are_listed_with_their_cost(make_config, tmp_path: Path) -> None:
    def config(*probes: str) -> Any:
        return make_config(train__eval_probes=list(probes), train__probe_interval=100)

    text = dry_run(config("copy,length=16,strings=9"))
    # Nine rows of 31 tokens, two in each sample of 64, so eight in a micro-batch of two are four.
    assert "probes, every 100 iterations:" in text
    line = next(line.split() for line in text.splitlines() if line.startswith("copy"))
    assert line == ["copy", "9", "384", "0.25%"]  # 384 / (3 * 100 * 8 * 64)
    with pytest.raises(UserError, match="train.eval_probes: pairs: needs a file"):
        dry_run(config("pairs"))
    with pytest.raises(UserError, match="copy: 2 occurrences of 64 tokens do not fit into 64"):
        dry_run(config("copy"))
    with pytest.raises(UserError, match="train.eval_probes and train.probe_interval: one is set"):
        make_config(train__eval_probes=["copy"])


def test_more_processes_are_more_copies(make_config) -> None:
    text = dry_run(make_config(parallel__tensor_model_parallel_size=2), world_size=8)
    assert "8 processes: 2 per copy of the model, 4 copies" in text


def test_a_world_that_does_not_fit_is_refused(make_config) -> None:
    with pytest.raises(UserError, match="micro_batch_size"):
        dry_run(make_config(), world_size=3)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"train__train_iters": 10},
            "5 iterations of 16 samples of 64 tokens; .* at iteration 5 of 10, sample 40 of 120\n",
        ),
        (
            {"train__train_iters": None, "train__train_samples": 80},
            "2 iterations of 16 samples of 64 tokens; .* at iteration 5 of 7, sample 40 of 72\n",
        ),
    ],
    ids=["train_iters", "train_samples"],
)
def test_a_resume_with_another_batch_size(
    make_config, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    write_checkpoint_state(make_config(), tmp_path)
    text = dry_run(
        make_config(checkpoint__load=str(tmp_path), train__global_batch_size=16, **changes)
    )
    assert re.search(expected, text)
    # The plan ends at the end of the run.
    assert re.search(rf"64 to {expected[-4:-1].strip()} ", text)
    left_over = "the last 8 of 80 do not fill a global batch of 16 and are not trained"
    assert (left_over in text) == ("train__train_samples" in changes)


def test_too_many_epochs_are_foreseen(make_config) -> None:
    config = make_config(
        data__sources__second__max_epochs=1.0, train__train_iters=400, train__eval_interval=None
    )
    with pytest.raises(UserError, match=r"data\.sources\.second\.max_epochs: .* at iteration \d+"):
        dry_run(config)


def test_every_error_and_every_warning_is_told(make_config, tmp_path: Path) -> None:
    config = make_config(data__sources__second__max_epochs=1.0, train__train_iters=400)
    with pytest.raises(UserError) as caught:
        dry_run(config, world_size=3)
    text = str(caught.value)
    assert text.startswith("2 errors: (1) train.global_batch_size: ")
    assert "; (2) data.sources.second.max_epochs: " in text
    text = dry_run(make_config(checkpoint__load=str(tmp_path)))
    findings, _, summary = text.partition("\n\n")
    assert (
        f"  - checkpoint.load: {tmp_path} contains no checkpoint; starting from scratch" in findings
    )
    assert summary.startswith("10 iterations of ")


def test_random_weights_are_a_finding_unless_they_are_asked_for(make_config) -> None:
    for load in (None, "nowhere"):
        [first, *_] = open_inputs(make_config(checkpoint__load=load)).findings
        assert first.startswith("checkpoint: RANDOM WEIGHTS: ") and "--from-scratch" in first
        asked = make_config(checkpoint__load=load, checkpoint__from_scratch=True)
        assert not any("RANDOM WEIGHTS" in finding for finding in open_inputs(asked).findings)
    with pytest.raises(UserError, match="from_scratch and checkpoint.pretrained_checkpoint: both"):
        make_config(checkpoint__from_scratch=True, checkpoint__pretrained_checkpoint="ckpt")


def test_a_long_plan_is_left_out(make_config) -> None:
    weights = {"first": 1, "second": 1}
    knots = [{"at": at, "weights": weights} for at in range(15)]
    config = make_config(data__schedule={"knots": knots})
    assert "30 rows are not shown" in dry_run(config)
    assert "14 to 80" in dry_run(config, verbose=True)


def test_findings_name_repetition_and_unchecked_tokenizers(make_config) -> None:
    config = make_config(train__train_iters=400, train__eval_interval=None)
    inputs = open_inputs(config)
    for name in ("first", "second"):
        [unchecked] = [f for f in inputs.findings if f.startswith(f"data.sources.{name}: 1 of 1")]
        assert "has no .json" in unchecked and f"{name}_text_document" in unchecked
    [epochs] = [finding for finding in inputs.findings if "epochs in this run" in finding]
    assert epochs.startswith("data.sources.second: ")
    text = dry_run(config)
    assert text.startswith("no errors; findings:\n") and "resolved configuration:\n" not in text
    text = dry_run(config, verbose=True)
    assert text.index("findings:") < text.index("blend") < text.index("resolved configuration:")
    assert all(f"  - {finding}" in text for finding in inputs.findings)


def test_packed_documents_are_counted(make_config, tiny_run: TinyRun, tmp_path: Path) -> None:
    documents = [[5, 6, 7], [5, 6, 7, 8], [9] * 100]
    masks = [[0, 1, 1], [0] * 4, [0] * 10 + [1] * 90]
    for name, dtype, rows in (("document", np.uint16, documents), ("loss_mask", np.uint8, masks)):
        writer = IndexedDatasetWriter(tmp_path / f"chat_{name}", dtype)
        for row in rows:
            writer.add_document(row)
        writer.finalize()
    text = dry_run(
        make_config(
            data__sources__second__paths=[str(tmp_path / "chat_document")],
            data__sources__second__loss="response",
            train__eval_interval=None,
            data__holdout_every=None,
        )
    )
    [header, _, _, row] = text[text.index("source  tokens") :].splitlines()[:4]
    assert header.split("  ")[-3:] == [
        "packed documents",
        "of these truncated",
        "skipped, no loss tokens",
    ]
    assert row.split()[0] == "second" and row.split()[-3:] == ["2", "1", "1"]


def test_a_validation_without_data_is_a_finding(make_config, tiny_run: TinyRun) -> None:
    """Validation that was not requested is not a finding."""

    def findings(**changes: Any) -> list[str]:
        found = open_inputs(make_config(**changes)).findings
        return [finding for finding in found if finding.startswith("train.eval_interval")]

    assert findings() == []
    assert findings(data__holdout_every=None) == [
        "train.eval_interval: no source has held-out samples, so validation is skipped; set "
        "validation_paths or set data.holdout_every"
    ]
    assert findings(data__holdout_every=None, train__eval_interval=None) == []
    assert findings(data__holdout_every=None, train__eval_iters=0) == []
    # The second source has 300 documents, the first 400.
    assert findings(data__holdout_every=350) == [
        "train.eval_interval: second has no held-out samples and is not validated; set "
        "validation_paths or lower data.holdout_every (350)"
    ]
    paths = [str(tiny_run.folder / "first_text_document")]
    changes = {"data__holdout_every": None, "data__sources__first__validation_paths": paths}
    (finding,) = findings(**changes)
    assert "second has no held-out samples" in finding
    assert open_inputs(make_config(train__eval_iters=0)).validation_sources == []


def test_beginning_from_a_huggingface_folder(
    make_config, tiny_run: TinyRun, tmp_path: Path
) -> None:
    shape = LlamaShape.of(make_config().model, 600)
    tensors = {name: torch.ones(size) for name, size in huggingface_shapes(shape).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(shape, torch.float32, {})))
    shutil.copy(tiny_run.tokenizer_model, tmp_path)
    for verify in (False, True):  # such a folder has no hashes, and the run does not require any
        config = make_config(checkpoint__load_hf=str(tmp_path), checkpoint__ckpt_verify=verify)
        assert f"starts from the weights of {tmp_path}" in dry_run(config)

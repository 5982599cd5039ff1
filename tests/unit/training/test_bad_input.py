"""Tests that every error in a run's inputs gives one line with its cause, place and remedy."""

import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TinyRun, train_tokenizer, write_checkpoint_state

from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.training.inputs import open_inputs


def _refused(pattern: str, make_config, **changes) -> None:
    """Asserts that the configuration is refused in one line that the pattern matches."""
    with pytest.raises(UserError, match=pattern) as caught:
        open_inputs(make_config(**changes))
    assert "\n" not in str(caught.value)


def _copy(tiny_run: TinyRun, folder: Path) -> Path:
    """Returns a copy of the first dataset, to be damaged."""
    prefix = folder / "damaged_text_document"
    for suffix in (".bin", ".idx"):
        shutil.copy(tiny_run.folder / f"first_text_document{suffix}", f"{prefix}{suffix}")
    return prefix


def _idx(prefix: Path) -> Path:
    return Path(f"{prefix}.idx")


def test_good_input_is_accepted(make_config) -> None:
    inputs = open_inputs(make_config())
    assert [source.name for source in inputs.sources] == ["first", "second"]
    assert inputs.resumed is None


def test_no_such_data(make_config, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere_document")
    _refused(
        r"data\.sources\.first\.paths\[0\].*nowhere_document",
        make_config,
        data__sources__first__paths=[missing],
    )


def test_truncated_idx(make_config, tiny_run: TinyRun, tmp_path: Path) -> None:
    prefix = _copy(tiny_run, tmp_path)
    content = _idx(prefix).read_bytes()
    for length in (0, 8, 33, 40, len(content) // 2, len(content) - 1):
        _idx(prefix).write_bytes(content[:length])
        _refused(
            r"data\.sources\.first\.paths\[0\].*damaged_text_document",
            make_config,
            data__sources__first__paths=[str(prefix)],
        )


def test_idx_of_another_magic(make_config, tiny_run: TinyRun, tmp_path: Path) -> None:
    prefix = _copy(tiny_run, tmp_path)
    content = bytearray(_idx(prefix).read_bytes())
    content[:4] = b"ABCD"
    _idx(prefix).write_bytes(content)
    _refused(
        r"paths\[0\].*\.idx.*MMIDIDX",
        make_config,
        data__sources__first__paths=[str(prefix)],
    )


def test_idx_longer_than_its_bin(make_config, tiny_run: TinyRun, tmp_path: Path) -> None:
    prefix = _copy(tiny_run, tmp_path)
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes()[:-2])
    _refused(r"paths\[0\].*\.bin", make_config, data__sources__first__paths=[str(prefix)])


def test_lengths_and_pointers_that_disagree(make_config, tiny_run: TinyRun, tmp_path: Path) -> None:
    prefix = _copy(tiny_run, tmp_path)
    content = bytearray(_idx(prefix).read_bytes())
    struct.pack_into("<i", content, 34, 10**6)  # the length of the first document
    _idx(prefix).write_bytes(content)
    _refused(r"paths\[0\].*\.idx", make_config, data__sources__first__paths=[str(prefix)])


def test_tokenizer_that_does_not_fit_the_model(make_config) -> None:
    _refused(r"model\.vocab_size: 599 is below the 600", make_config, model__vocab_size=599)


def _write_sidecar(prefix: Path, tokenizer_sha256: str) -> None:
    dataset = IndexedDataset(prefix)
    sidecar = {
        "format_version": 1,
        "tool_version": "0",
        "inputs": [],
        "dropped": {},
        "num_loss_tokens": dataset.num_tokens,
        "num_text_bytes": 0,
        "tokenizer": {
            "type": "Llama2Tokenizer",
            "sha256": tokenizer_sha256,
            "vocab_size": 600,
        },
        "num_documents": dataset.num_documents,
        "num_tokens": dataset.num_tokens,
        "sha256": {"bin": "1" * 64, "idx": "2" * 64},
    }
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))


def test_tokenizer_other_than_the_corpus_was_made_with(
    make_config, tiny_run: TinyRun, tmp_path: Path
) -> None:
    prefix = _copy(tiny_run, tmp_path)
    _write_sidecar(prefix, "0" * 64)
    _refused(
        r"data\.sources\.first\.paths\[0\].*tokenizer",
        make_config,
        data__sources__first__paths=[str(prefix)],
    )


def test_ids_beyond_the_vocabulary(make_config, tmp_path: Path) -> None:
    prefix = tmp_path / "wide_text_document"
    writer = IndexedDatasetWriter(prefix, "uint16")
    writer.add_document([700] * 500)
    writer.finalize()
    config = make_config(data__sources__first__paths=[str(prefix)])
    with pytest.raises(UserError, match=r"data\.sources\.first.*700"):
        open_inputs(config).sources[0].sample(0)


def test_missing_tokenizer(make_config, tmp_path: Path) -> None:
    _refused(
        "nowhere.model", make_config, tokenizer__tokenizer_model=str(tmp_path / "nowhere.model")
    )


def test_empty_source_with_weight(make_config, tmp_path: Path) -> None:
    prefix = tmp_path / "empty_text_document"
    IndexedDatasetWriter(prefix, "uint16").finalize()
    _refused(
        r"data\.sources\.first: is empty",
        make_config,
        data__sources__first__paths=[str(prefix)],
    )


def test_empty_source_without_weight_is_accepted(make_config, tmp_path: Path) -> None:
    prefix = tmp_path / "empty_text_document"
    IndexedDatasetWriter(prefix, "uint16").finalize()
    inputs = open_inputs(
        make_config(
            data__sources__first__paths=[str(prefix)],
            data__schedule={"knots": [{"at": 0, "weights": {"second": 1}}]},
        )
    )
    assert inputs.sources[0].num_samples == 0


@pytest.mark.parametrize(
    "weights",
    [{"first": -1, "second": 2}, {"first": math.nan}, {"first": 0, "second": 0}, {"third": 1}],
    ids=["negative", "nan", "all zero", "unknown source"],
)
def test_impossible_weights(make_config, weights) -> None:
    _refused(
        r"data\.schedule\.knots\[0\]\.weights",
        make_config,
        data__schedule={"knots": [{"at": 0, "weights": weights}]},
    )


def _checkpoint(make_config, folder: Path, **state) -> None:
    write_checkpoint_state(make_config(), folder, **state)


def test_checkpoint_of_another_model(make_config, tmp_path: Path) -> None:
    _checkpoint(make_config, tmp_path)
    _refused(
        r"model\.num_layers: 2 here and 4 in .*iter_0000005",
        make_config,
        model__num_layers=2,
        checkpoint__load=str(tmp_path),
    )


def test_checkpoint_of_other_data(make_config, tiny_run: TinyRun, tmp_path: Path) -> None:
    _checkpoint(make_config, tmp_path)
    other = str(tiny_run.folder / "second_text_document")
    _refused(
        r"data\.sources\.first\.paths\[0\]: .*second_text_document is not the data that .* \(400 "
        r"documents and \d+ tokens in the checkpoint, 300 and \d+ here\)",
        make_config,
        data__sources__first__paths=[other],
        checkpoint__load=str(tmp_path),
    )
    same = str(tiny_run.folder / "first_text_document")
    _refused(
        r"data\.sources\.first\.paths: lists 2 datasets here and 1 in .* into a new source",
        make_config,
        data__sources__first__paths=[same, other],
        checkpoint__load=str(tmp_path),
    )


def test_checkpoint_of_the_same_data_in_another_order(
    make_config, tiny_run: TinyRun, tmp_path: Path
) -> None:
    paths = [str(tiny_run.folder / f"{name}_text_document") for name in ("first", "second")]
    write_checkpoint_state(make_config(data__sources__first__paths=paths), tmp_path)
    _refused(
        r"data\.sources\.first\.paths: lists the datasets of .* in another order",
        make_config,
        data__sources__first__paths=paths[::-1],
        checkpoint__load=str(tmp_path),
    )


@pytest.mark.parametrize(
    "changes, cause",
    [
        (
            {"data__seq_length": 32},
            r"data\.seq_length: 32 here and 64 in .*iter_0000005; .* Use --seq-length 64, or "
            r"start a new run of length 32 from these weights with --finetune and another --save",
        ),
        (
            {"data__holdout_every": 40},
            r"data\.holdout_every: 40 for data\.sources\.first here and 50 in",
        ),
        (
            {"data__sources__first__validation_paths": ["FOLDER/second_text_document"]},
            r"data\.holdout_every: none for data\.sources\.first here and 50 in",
        ),
        (
            {"data__holdout_every": None, "data__split": "9,1"},
            r"data\.holdout_every: none for data\.sources\.first here and 50 in",
        ),
        (
            {"data__sources__second__packing": "none"},
            r"data\.sources\.second\.packing: none here and best_fit in .*; set it to best_fit",
        ),
    ],
    ids=["sequence length", "holdout", "validation paths", "split for holdout", "packing"],
)
def test_settings_that_change_the_samples_are_named(
    make_config, tiny_run: TinyRun, tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    """The message must not report different data, which the user would search for in vain."""
    _checkpoint(make_config, tmp_path)
    given = {
        name: [path.replace("FOLDER", str(tiny_run.folder)) for path in value]
        if isinstance(value, list)
        else value
        for name, value in changes.items()
    }
    _refused(cause, make_config, checkpoint__load=str(tmp_path), **given)


def test_the_test_part_of_a_split_needs_no_validation(make_config) -> None:
    """Megatron-LM evaluates it at the end of the run, whatever the interval."""
    common = {"data__holdout_every": None, "train__eval_interval": None}
    for split, eval_iters, has_test in (("6,2,2", 2, True), ("6,4", 2, False), ("6,2,2", 0, False)):
        config = make_config(data__split=split, train__eval_iters=eval_iters, **common)
        inputs = open_inputs(config)
        assert not inputs.validation_sources
        assert any(source.num_samples for source in inputs.test_sources) == has_test


def test_another_split_on_resume(make_config, tmp_path: Path) -> None:
    common = {"data__holdout_every": None}
    write_checkpoint_state(make_config(data__split="90,8,2", **common), tmp_path)
    for split, cause in {
        "8,2": r"data\.split: 80,20,0 \(in percent\) for data\.sources\.first here and 90,8,2 in",
        None: r"data\.split: none .* here and 90,8,2 in",
    }.items():
        _refused(cause, make_config, data__split=split, checkpoint__load=str(tmp_path), **common)


def test_packing_without_loss_tokens_on_resume(make_config, tmp_path: Path) -> None:
    """The set of omitted documents is kept on resume, or the resume is refused with the cause."""
    documents, masks = [[5, 6, 7]] * 6, [[0, 1, 1]] * 4 + [[0, 0, 0]] * 2
    prefix = tmp_path / "chat_document"
    for path, dtype, rows in (
        (prefix, "uint16", documents),
        (loss_mask_prefix(prefix), "uint8", masks),
    ):
        writer = IndexedDatasetWriter(path, dtype)
        for row in rows:
            writer.add_document(row)
        writer.finalize()
    changes = {"data__sources__second__paths": [str(prefix)], "data__holdout_every": None}
    changes["train__eval_interval"] = None
    response, every = (
        {**changes, "data__sources__second__loss": loss} for loss in ("response", "all")
    )
    # A run that started with all documents, as earlier versions did, keeps all of them.
    write_checkpoint_state(make_config(**every), tmp_path / "all")
    inputs = open_inputs(make_config(checkpoint__load=str(tmp_path / "all"), **response))
    assert len(inputs.sources[1].packing.documents) == 6
    write_checkpoint_state(make_config(**response), tmp_path / "response")
    inputs = open_inputs(make_config(checkpoint__load=str(tmp_path / "response"), **response))
    assert len(inputs.sources[1].packing.documents) == 4
    _refused(
        r"data\.sources\.second\.loss: packing skips documents without loss tokens",
        make_config,
        checkpoint__load=str(tmp_path / "response"),
        **every,
    )


def test_another_sequence_length_is_no_obstacle_to_finetuning(make_config, tmp_path: Path) -> None:
    _checkpoint(make_config, tmp_path)
    changes = {"checkpoint__load": str(tmp_path), "checkpoint__finetune": True}
    assert open_inputs(make_config(data__seq_length=32, **changes)).resumed is None


def test_another_sequence_length_with_other_sources(
    make_config, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """There is no source whose samples could be compared."""
    _checkpoint(make_config, tmp_path)
    _refused(
        r"data\.seq_length: 32 here and 64 in",
        make_config,
        data__seq_length=32,
        data__sources={"third": {"paths": [str(tiny_run.folder / "first_text_document")]}},
        data__schedule={"knots": [{"at": 0, "weights": {"third": 1}}]},
        checkpoint__load=str(tmp_path),
    )


def test_a_json_that_came_or_went_is_named(make_config, tiny_run: TinyRun, tmp_path: Path) -> None:
    prefix = _copy(tiny_run, tmp_path)
    data = {"data__sources__first__paths": [str(prefix)]}
    _write_sidecar(prefix, load_tokenizer(tiny_run.tokenizer_model).fingerprint)
    write_checkpoint_state(make_config(**data), tmp_path / "with")
    Path(f"{prefix}.json").unlink()
    load = {"checkpoint__load": str(tmp_path / "with")}
    _refused(
        r"paths\[0\]: .* no longer has a \.json file, but had one", make_config, **data, **load
    )
    write_checkpoint_state(make_config(**data), tmp_path / "without")
    _write_sidecar(prefix, load_tokenizer(tiny_run.tokenizer_model).fingerprint)
    load = {"checkpoint__load": str(tmp_path / "without")}
    _refused(r"paths\[0\]: .* now has a \.json file.*remove the file", make_config, **data, **load)


def test_checkpoint_of_another_tokenizer(make_config, tmp_path: Path) -> None:
    _checkpoint(make_config, tmp_path / "run")
    other = train_tokenizer(tmp_path / "other.model")
    other.write_bytes(other.read_bytes() + b"\x2a\x00")  # an empty field: the same pieces
    _refused(
        r"tokenizer\.tokenizer_model: is not the tokenizer that",
        make_config,
        tokenizer__tokenizer_model=str(other),
        checkpoint__load=str(tmp_path / "run"),
    )


def test_edited_past(make_config, tmp_path: Path) -> None:
    _checkpoint(make_config, tmp_path)
    _refused(
        r"sample 0\b",
        make_config,
        data__schedule={"knots": [{"at": 0, "weights": {"first": 1, "second": 1}}]},
        checkpoint__load=str(tmp_path),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, 5),
        ("datasets", [1]),
        ("block_hash", {"bin": "0"}),
        ("block_hash", [{"bin": [0]}]),
        ("packing", "1"),
        ("seq_length", [64]),
    ],
)
def test_damaged_fingerprints_in_a_checkpoint(
    make_config, tmp_path: Path, key: str | None, value: object
) -> None:
    _checkpoint(make_config, tmp_path)
    state = iteration_folder(tmp_path, 5) / "state.json"
    content = json.loads(state.read_bytes())
    source = content["sources"]["first"]
    content["sources"]["first"] = value if key is None else {**source, key: value}
    state.write_text(json.dumps(content))
    place = "first" if key is None else rf"first\.{key}"
    _refused(rf"state\.json: sources\.{place}", make_config, checkpoint__load=str(tmp_path))


def test_damaged_checkpoint_records(make_config, tmp_path: Path) -> None:
    _checkpoint(make_config, tmp_path)
    state = iteration_folder(tmp_path, 5) / "state.json"
    content = state.read_text()
    for damaged in ("", content[: len(content) // 2], "[]", "{}"):
        state.write_text(damaged)
        _refused(r"state\.json", make_config, checkpoint__load=str(tmp_path))
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    latest.write_text("soon")
    _refused(
        r"latest_checkpointed_iteration\.txt: 'soon'", make_config, checkpoint__load=str(tmp_path)
    )
    latest.write_text("7")
    _refused("names iteration 7", make_config, checkpoint__load=str(tmp_path))


def test_load_of_a_folder_without_a_checkpoint_starts_fresh(
    make_config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = open_inputs(make_config(checkpoint__load=str(tmp_path / "nothing")))
    assert inputs.resumed is None
    assert re.search("contains no checkpoint; starting from scratch", caplog.text)


def test_finetune_needs_a_checkpoint(make_config, tmp_path: Path) -> None:
    _refused(
        r"checkpoint\.load: .*contains no checkpoint",
        make_config,
        checkpoint__load=str(tmp_path),
        checkpoint__finetune=True,
    )


def test_pretrained_weights_serve_until_the_run_has_a_checkpoint(
    make_config, tmp_path: Path
) -> None:
    _checkpoint(make_config, tmp_path / "foundation")
    changes = {
        "checkpoint__load": str(tmp_path / "run"),
        "checkpoint__pretrained_checkpoint": str(tmp_path / "foundation"),
    }
    fresh = open_inputs(make_config(**changes))
    assert fresh.checkpoint == tmp_path / "foundation" / "iter_0000005"
    assert fresh.resumed is None
    _checkpoint(make_config, tmp_path / "run")
    resumed = open_inputs(make_config(**changes))
    assert resumed.checkpoint == tmp_path / "run" / "iter_0000005"
    assert resumed.resumed is not None and resumed.resumed.iteration == 5


def test_pretrained_weights_have_to_be_there(make_config, tmp_path: Path) -> None:
    _refused(
        r"checkpoint\.pretrained_checkpoint: .*contains no checkpoint",
        make_config,
        checkpoint__pretrained_checkpoint=str(tmp_path),
    )


def test_imported_weights_are_no_run_to_resume(make_config, tmp_path: Path) -> None:
    _checkpoint(make_config, tmp_path, schedule={})
    _refused(
        "contains only weights and cannot be resumed; add --finetune",
        make_config,
        checkpoint__load=str(tmp_path),
    )

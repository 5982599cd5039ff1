"""Tests findings: data that is suspicious, but not wrong enough to refuse the run."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from data_files import PlainTokenizer, data_config, numbered_documents, write_dataset

from megatron_chatflow.data import findings
from megatron_chatflow.data.findings import data_findings
from megatron_chatflow.data.source import build_sources

EOS, OTHER_CONTROL = 2, 7


@dataclass(frozen=True)
class ControlTokenizer(PlainTokenizer):
    """A tokenizer with two control tokens."""

    eos_id: int = EOS
    vocab_size: int = 5000

    @property
    def num_bytes_per_id(self) -> np.ndarray:
        num_bytes = np.ones(self.vocab_size, np.int64)
        num_bytes[[EOS, OTHER_CONTROL]] = 0
        return num_bytes


def findings_of(sources: dict, **fields) -> list[str]:
    """Returns the findings, without those about unchecked tokenizers.

    All of these datasets have the latter.
    """
    config, tokenizer = data_config(sources, **fields), ControlTokenizer()
    built = [
        build_sources(config, seed=1, tokenizer=tokenizer, split=split)
        for split in ("train", "validation")
    ]
    found = data_findings(config, *built, tokenizer)
    return [finding for finding in found if "no .json" not in finding]


def dataset(folder: Path, name: str, *, seed: int = 0, masks: bool = False) -> str:
    """Writes twelve documents that end with EOS."""
    folder.mkdir(exist_ok=True)
    lengths = np.random.default_rng(seed).integers(5, 9, 12)
    documents = [[*document, EOS] for document in numbered_documents(lengths)]
    return write_dataset(
        folder / f"{name}_document",
        documents,
        masks=[[1] * len(document) for document in documents] if masks else None,
    )


def copy_of(path: str, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    for suffix in ("bin", "idx"):
        shutil.copy(f"{path}.{suffix}", folder)
    return str(folder / Path(path).name)


def test_clean_data_has_no_findings(tmp_path: Path) -> None:
    first, second = dataset(tmp_path, "a"), dataset(tmp_path, "b", seed=1, masks=True)
    held_out = dataset(tmp_path, "c", seed=2)
    sources = {
        "a": {"paths": [first], "validation_paths": [held_out]},
        "b": {"paths": [second], "loss": "response", "packing": "best_fit"},
    }
    assert findings_of(sources, holdout_every=3) == []


def test_loss_masks_that_are_ignored(tmp_path: Path) -> None:
    paths = [dataset(tmp_path, "a", masks=True), dataset(tmp_path, "b", seed=1)]
    [finding] = findings_of({"x": {"paths": paths}})
    assert finding.startswith(
        "data.sources.x: 1 of 2 datasets has loss masks, which the default (loss: all)"
    )
    assert "set loss: response, or set loss: all" in finding and f"(first: {paths[0]})" in finding
    assert findings_of({"x": {"paths": paths, "loss": "all"}}) == []


@pytest.mark.parametrize("last", [[EOS], [OTHER_CONTROL], [OTHER_CONTROL, 50], []])
def test_documents_without_an_end(tmp_path: Path, last: list[int]) -> None:
    """A control token ends a document even if a template puts a newline after it."""
    documents = [[*document, *last] for document in numbered_documents([6, 0, 9, 7, 8])]
    documents[1] = []
    path = write_dataset(tmp_path / "a_document", documents)
    found = findings_of({"x": {"paths": [path]}})
    if last:
        assert found == []
    else:
        assert found[0].startswith(
            "data.sources.x: 4 of 4 checked documents do not end with EOD (id 2)"
        )
        assert "--append-eod" in found[0]


def test_ids_outside_the_vocabulary_end_nothing(tmp_path: Path) -> None:
    documents = [[50] * 5 + [60_000 if k else EOS] for k in range(40)]
    path = write_dataset(tmp_path / "a_document", documents)
    sources = {"x": {"paths": [path]}}
    config = data_config(sources)
    built = build_sources(config, seed=1, tokenizer=PlainTokenizer())
    [finding] = [f for f in data_findings(config, built, [], ControlTokenizer()) if "EOD" in f]
    assert "39 of 40 checked documents" in finding


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_dataset_given_twice(tmp_path: Path, is_copy: bool) -> None:
    path, other = dataset(tmp_path, "a"), dataset(tmp_path, "b", seed=1)
    again = copy_of(path, tmp_path / "copy") if is_copy else path
    [finding] = findings_of({"x": {"paths": [path, other, again]}})
    assert finding.startswith(f"data.sources.x: {again}")
    assert (f"(the same data as {path})" in finding) == is_copy
    assert "is listed twice" in finding
    [finding] = findings_of({"x": {"paths": [path]}, "y": {"paths": [other, again]}})
    assert finding.startswith(f"data.sources.y: {again}")
    assert "is also in data.sources.x" in finding
    # A source that is never drawn repeats nothing.
    weights = {"x": 1, "y": 0}
    assert findings_of({"x": {"paths": [path]}, "y": {"paths": [again]}}, weights=weights) == []


def test_many_datasets_given_twice_are_one_finding(tmp_path: Path) -> None:
    paths = [dataset(tmp_path, str(k), seed=k) for k in range(5)]
    [finding] = findings_of({"x": {"paths": paths}, "y": {"paths": paths}})
    assert f"data.sources.y: {paths[0]} and 4 others is also in data.sources.x" in finding


def test_validation_on_training_data(tmp_path: Path) -> None:
    path, other = dataset(tmp_path, "a"), dataset(tmp_path, "b", seed=1)
    copy = copy_of(path, tmp_path / "copy")
    [finding] = findings_of({"x": {"paths": [path, other], "validation_paths": [copy]}})
    assert finding.startswith(f"data.sources.x: validates on {copy} (the same data as {path})")
    assert "which data.sources.x trains on" in finding
    [finding] = findings_of(
        {"x": {"paths": [path]}, "y": {"paths": [other], "validation_paths": [path]}}
    )
    assert finding.startswith(f"data.sources.y: validates on {path}, which data.sources.x trains")
    # One source trains on the documents that another holds out, because it has its own validation
    # data.
    third = dataset(tmp_path, "c", seed=2)
    found = findings_of(
        {"x": {"paths": [path]}, "y": {"paths": [path], "validation_paths": [third]}},
        holdout_every=3,
    )
    assert any(
        finding.startswith(f"data.sources.x: validates on {path}, which data.sources.y trains")
        for finding in found
    )
    # Both sources hold out the same documents of the same dataset, so neither trains on them.
    found = findings_of({"x": {"paths": [path]}, "y": {"paths": [path]}}, holdout_every=3)
    assert not any("validates" in finding for finding in found)
    # A source of weight 0 is only used for validation.
    sources = {"x": {"paths": [other]}, "y": {"paths": [path], "validation_paths": [path]}}
    assert findings_of(sources, weights={"x": 1, "y": 0}) == []
    # Copies within a source are counted once.
    sources = {"x": {"paths": [path, copy, path], "validation_paths": [path, copy]}}
    [finding] = [finding for finding in findings_of(sources) if "validates" in finding]
    assert f"validates on {path} and 1 others, which data.sources.x trains on" in finding


def test_documents_without_loss_tokens(tmp_path: Path) -> None:
    documents = [[*document, EOS] for document in numbered_documents([4, 6, 3])]
    masks = [[0, 0, 1, 1, 1], [0] * 7, [0, 1, 1, 1]]
    path = write_dataset(tmp_path / "m_document", documents, masks=masks)
    source = {"paths": [path], "loss": "response", "packing": "best_fit", "boundaries": "isolate"}
    [finding] = findings_of({"x": source})
    assert finding.startswith("data.sources.x: packing drops 1 of 3 documents")


def test_packing_that_cuts_much(tmp_path: Path) -> None:
    source = {"packing": "best_fit", "boundaries": "isolate"}
    path = write_dataset(tmp_path / "huge_document", [[*numbered_documents([1008])[0], EOS]])
    [finding] = findings_of({"x": {"paths": [path], **source}})
    assert "packing cuts 1 of 1 documents to 9 tokens and drops 1,000 tokens" in finding
    assert "(99.1%)" in finding
    documents = [[*document, EOS] for document in numbered_documents([8] * 120 + [9])]
    path = write_dataset(tmp_path / "long_document", documents)
    assert findings_of({"x": {"paths": [path], **source}}) == []


def test_sidecars_without_block_hashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their data cannot be compared with anything, which the start of a run must report."""
    paths = [dataset(tmp_path, "a"), dataset(tmp_path, "b", seed=1)]
    settings = {"settings": {"append_eod": True}}
    sidecars = {paths[0]: {**settings, "block_hash": {}}, paths[1]: settings}
    sources = {"x": {"paths": paths}}
    config, tokenizer = data_config(sources), ControlTokenizer()
    built = build_sources(config, seed=1, tokenizer=tokenizer)
    monkeypatch.setattr(findings, "read_sidecar", lambda prefix: sidecars[str(prefix)])
    [finding] = [one for one in data_findings(config, built, [], tokenizer) if "hash" in one]
    assert finding.startswith("data.sources.x: 1 of 2 datasets has a .json of an earlier version")
    assert "use --data-verify to check all bytes" in finding and f"{paths[1]}.json" in finding
    config = data_config(sources, data_verify=True)
    assert not [one for one in data_findings(config, built, [], tokenizer) if "hash" in one]

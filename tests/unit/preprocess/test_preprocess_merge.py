"""Tests merging datasets: documents, masks and sidecars, and the refusal of incompatible ones."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_files import write_dataset
from preprocess_jobs import Jobs

from megatron_chatflow.data import indexed
from megatron_chatflow.data.indexed import HEADER, IndexedDataset, IndexedDatasetWriter
from megatron_chatflow.data.sidecar import read_sidecar
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.inspect import Inspection, first_difference
from megatron_chatflow.preprocess.merge import find_datasets, merge_datasets
from megatron_chatflow.preprocess.settings import CorpusSettings

TEXTS = ["bana kedo", "luno", "", "\u4e00\u4e25 sanka rasen"]


def shard(folder: Path, model: Path, name: str, texts: list[str], **corpus: object) -> Path:
    jobs = Jobs(folder, model)
    jobs.prefix = folder / name
    records = [{"text": text, "en": text + " a", "zh": "b " + text} for text in texts]
    jobs.run(jobs.lines(f"{name}.jsonl", records), corpus=CorpusSettings(**corpus))
    return folder / f"{name}_text_document"


def test_merged_shards_are_the_whole(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    for corpus in ({}, {"format": "pairs"}):
        folder = tmp_path / corpus.get("format", "text")
        folder.mkdir()
        whole = shard(folder, tiny_sentencepiece_model, "whole", TEXTS * 2 + ["x"], **corpus)
        first = shard(folder, tiny_sentencepiece_model, "s0", TEXTS * 2, **corpus)
        second = shard(folder, tiny_sentencepiece_model, "s1", ["x"], **corpus)
        merged = folder / "merged_text_document"
        num_documents = merge_datasets([first, second], merged)
        for suffix in ("bin", "idx"):
            assert Path(f"{merged}.{suffix}").read_bytes() == Path(f"{whole}.{suffix}").read_bytes()
        inspection = Inspection(merged)
        assert num_documents == inspection.dataset.num_documents
        assert (inspection.mask is not None) == bool(corpus)
        content, expected = read_sidecar(merged), read_sidecar(whole)
        assert content is not None and expected is not None
        assert [given["name"] for given in content.pop("inputs")] == ["s0.jsonl", "s1.jsonl"]
        expected.pop("inputs")
        assert content == expected


def test_prefixes_and_folders(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    first = shard(tmp_path, tiny_sentencepiece_model, "b", ["x"])
    second = shard(tmp_path, tiny_sentencepiece_model, "a", ["x"], format="pairs")
    assert find_datasets([str(tmp_path)]) == [second, first]
    assert find_datasets([f"{first}.idx", f"{second}.bin", str(first)]) == [first, second, first]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no dataset in folder"):
        find_datasets([str(tmp_path / "empty")])


def test_documents_of_several_sequences_stay_whole(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "x", np.int32)
    tokens, lengths = np.arange(7, dtype=np.int32), np.array([3, 4], np.int32)
    writer.add_sequences(tokens, lengths, np.array([2], np.int64))
    writer.finalize()
    merge_datasets([tmp_path / "x", tmp_path / "x"], tmp_path / "y")
    assert IndexedDataset(tmp_path / "y").document_indices.tolist() == [0, 2, 4]
    assert read_sidecar(tmp_path / "y") is None


def test_refuses_what_does_not_belong_together(
    tmp_path: Path, tiny_sentencepiece_model: Path
) -> None:
    text = shard(tmp_path, tiny_sentencepiece_model, "text", ["x"])
    pairs = shard(tmp_path, tiny_sentencepiece_model, "pairs", ["x"], format="pairs")
    other_model = tmp_path / "other.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["bana kedo luno"] * 50),
        model_prefix=str(other_model.with_suffix("")),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    other = shard(tmp_path, other_model, "other", ["x"])
    writer = IndexedDatasetWriter(tmp_path / "fractions", np.float32)
    writer.add_document([1])
    writer.finalize()
    out = tmp_path / "out_text_document"
    for inputs, message in [
        ([text, other], "different tokenizers: .*other_text_document was encoded with"),
        ([text, pairs], "no loss mask: .*text_text_document"),
        (
            [text, tmp_path / "fractions"],
            "different kinds of data: .*fractions has float32, .* uint16",
        ),
        ([], "nothing to merge"),
        ([text, tmp_path / "absent"], "absent.idx"),
        ([text, out], "output is also an input"),
    ]:
        with pytest.raises(UserError, match=message):
            merge_datasets(inputs, out)
    assert not list(tmp_path.glob("out_*"))
    merge_datasets([text], out)
    with pytest.raises(UserError, match="output exists"):
        merge_datasets([text], out)
    merge_datasets([text, text], out, overwrite=True)
    assert len(IndexedDataset(out)) == 2


@pytest.mark.parametrize("with_masks", [False, True])
def test_integer_types_are_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, with_masks
) -> None:
    monkeypatch.setattr(indexed, "WIDENED_BLOCK", 3)
    documents = {
        np.uint16: [[1, 2, 65499], [], [7]],
        np.int32: [[70_000, 3], [5] * 8],
        np.int16: [[-4, 9]],
    }
    for dtype, ids in documents.items():
        masks = [[1] * len(document) for document in ids] if with_masks else None
        write_dataset(tmp_path / f"{np.dtype(dtype)}_document", ids, dtype, masks)
    prefixes = [tmp_path / f"{np.dtype(dtype)}_document" for dtype in documents]
    merge_datasets(prefixes, tmp_path / "all_document")
    merged = IndexedDataset(tmp_path / "all_document")
    expected = sum(documents.values(), [])
    assert merged.dtype == np.int32
    assert [merged[k].tolist() for k in range(len(merged))] == expected
    assert "uint16_document from uint16 to the wider int32" in caplog.text
    # The bytes equal those of a dataset that was int32 from the beginning.
    write_dataset(tmp_path / "direct", expected, np.int32)
    for suffix in ("bin", "idx"):
        written = (tmp_path / f"all_document.{suffix}").read_bytes()
        assert written == (tmp_path / f"direct.{suffix}").read_bytes()
    assert (tmp_path / "all_loss_mask.idx").exists() == with_masks


def test_a_dataset_given_twice_is_reported(
    tmp_path: Path, tiny_sentencepiece_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = shard(tmp_path, tiny_sentencepiece_model, "a", ["x", "y"])
    shard(tmp_path, tiny_sentencepiece_model, "b", ["x", "z"])
    (tmp_path / "copy").mkdir()
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{first}.{suffix}", tmp_path / "copy")
    again = tmp_path / "copy" / ".." / first.name
    copy = tmp_path / "copy" / first.name
    merge_datasets([first, tmp_path / "b_text_document"], tmp_path / "one_text_document")
    assert "twice" not in caplog.text
    merge_datasets([first, again], tmp_path / "two_text_document")
    assert f"{again} contains the same documents as {first}" in caplog.text
    merge_datasets([first, copy], tmp_path / "three_text_document")
    assert f"{copy} contains the same documents as {first}" in caplog.text


def test_a_damaged_mask_is_refused(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    first = shard(tmp_path, tiny_sentencepiece_model, "a", ["x", "y y"], format="pairs")
    shard(tmp_path, tiny_sentencepiece_model, "b", ["x", "y y y y"], format="pairs")
    for suffix in ("bin", "idx"):
        shutil.copy(
            tmp_path / f"b_text_loss_mask.{suffix}", tmp_path / f"a_text_loss_mask.{suffix}"
        )
    with pytest.raises(UserError, match="loss mask does not fit: .* at sequence 1"):
        merge_datasets([first], tmp_path / "out_text_document")
    with pytest.raises(UserError, match="loss mask does not fit"):
        Inspection(first)
    write_dataset(tmp_path / "a_text_loss_mask", IndexedDataset(first), np.int32)
    with pytest.raises(UserError, match="not a loss mask: .* contains int32 instead of uint8"):
        merge_datasets([first], tmp_path / "out_text_document")


def test_offsets_past_two_to_the_forty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges two sparse datasets of 1 TB. Only the index of the copy is written."""
    for name in ("a", "b"):
        lengths = np.full(513, 2**30, np.int64)
        pointers = np.concatenate([[0], np.cumsum(lengths[:-1] * 2)])
        with (tmp_path / f"{name}.idx").open("wb") as file:
            file.write(HEADER.pack(indexed.MAGIC, 1, 8, 513, 514))
            file.write(lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes())
            file.write(np.arange(514, dtype="<i8").tobytes())
        with (tmp_path / f"{name}.bin").open("wb") as file:
            try:
                os.truncate(file.fileno(), int(lengths.sum()) * 2)
            except OSError:
                pytest.skip("this file system holds no sparse file of 1 TB")

    def size_of(self: indexed.StagedFile, source: Path) -> int:
        return source.stat().st_size

    monkeypatch.setattr(indexed.StagedFile, "append_file", size_of)
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    os.truncate(tmp_path / "c.bin", 1026 * 2**31)
    merged = IndexedDataset(tmp_path / "c")
    merged.validate()
    assert merged.sequence_pointers.tolist() == [k * 2**31 for k in range(1026)]
    assert merged.document_indices.tolist() == list(range(1027))
    assert merged.sequence_pointers[-1] > 2**40


def test_first_difference(tmp_path: Path) -> None:
    def dataset(name: str, documents: list[list[int]]) -> IndexedDataset:
        writer = IndexedDatasetWriter(tmp_path / name, np.uint16)
        for document in documents:
            writer.add_document(document)
        writer.finalize()
        return IndexedDataset(tmp_path / name)

    base = dataset("base", [[1, 2], [3], [4, 5, 6]])
    assert first_difference(base, dataset("x", [[1, 2], [3], [4, 5, 6]])) is None
    assert first_difference(base, dataset("x", [[1, 2], [3], [4, 7, 6]])) == (
        "sequence 2, token 1: 5 and 7"
    )
    assert first_difference(base, dataset("x", [[1, 2], [3, 4], [5, 6]])) == (
        "sequence 1: 1 and 2 tokens"
    )
    assert first_difference(base, dataset("x", [[1, 9], [3, 4], [5, 6]])) == (
        "sequence 0, token 1: 2 and 9"
    )
    assert first_difference(base, dataset("x", [[1, 2], [3]])) == "number of sequences: 3 and 2"
    writer = IndexedDatasetWriter(tmp_path / "y", np.uint16)
    writer.add_sequences(base.tokens, base.sequence_lengths, np.array([3], np.int64))
    writer.finalize()
    assert "documents begin" in str(first_difference(base, IndexedDataset(tmp_path / "y")))


def test_sidecars_of_another_kind(tmp_path: Path) -> None:
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "x.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged sidecar: .*x.json"):
            read_sidecar(tmp_path / "x")
    (tmp_path / "x.json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(UserError, match="format_version 2 instead of 1"):
        read_sidecar(tmp_path / "x")

"""Tests that every reader refuses, in one line, a loss mask that does not belong to its dataset."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_files import PlainTokenizer, data_config, write_dataset
from preprocess_jobs import Jobs

from megatron_chatflow.data.indexed import DTYPE_CODES, IndexedDatasetWriter
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.inspect import Inspection
from megatron_chatflow.preprocess.merge import merge_datasets
from megatron_chatflow.preprocess.settings import CorpusSettings

DOCUMENTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12]]


def commands(prefix: str) -> list[Callable[[], object]]:
    """Returns the commands that read masks: training (packed or not), inspection and merging."""

    def train(packing: str) -> None:
        source = {"paths": [prefix], "loss": "response", "packing": packing}
        config = data_config({"a": {**source, "boundaries": "isolate"}}, seq_length=4)
        build_sources(config, seed=1, tokenizer=PlainTokenizer())[0].sample(0)

    return [
        lambda: train("none"),
        lambda: train("best_fit"),
        lambda: Inspection(prefix).describe(),
        lambda: merge_datasets([Path(prefix)], Path(prefix).with_name("merged"), overwrite=True),
    ]


def refused(prefix: str, pattern: str) -> None:
    for command in commands(prefix):
        with pytest.raises(UserError, match=pattern) as caught:
            command()
        assert "\n" not in str(caught.value)


def write_mask(prefix: str, lengths: list[int], dtype: object = np.uint8) -> str:
    writer = IndexedDatasetWriter(loss_mask_prefix(prefix), dtype)
    for length in lengths:
        writer.add_document(np.ones(length, dtype))
    writer.finalize()
    return str(loss_mask_prefix(prefix))


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "a_document", DOCUMENTS)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPE_CODES.values() if dtype != np.uint8])
def test_masks_of_another_type(prefix: str, dtype: np.dtype) -> None:
    write_mask(prefix, [4, 2, 6], dtype)
    refused(prefix, rf"a_loss_mask: contains {dtype} instead of uint8")


@pytest.mark.parametrize("code", [0, 2, 4, 7, 8, 9, 255])
def test_masks_whose_index_names_another_type(prefix: str, code: int) -> None:
    mask = write_mask(prefix, [4, 2, 6])
    with open(f"{mask}.idx", "r+b") as file:
        file.seek(17)
        file.write(bytes([code]))
    refused(prefix, "a_loss_mask")


@pytest.mark.parametrize(
    "lengths", [[4, 2, 7], [4, 2, 5], [2, 4, 6], [4, 2], [4, 2, 6, 1], [12], []]
)
def test_masks_of_other_sequences(prefix: str, lengths: list[int]) -> None:
    write_mask(prefix, lengths)
    refused(prefix, "fit: .*a_loss_mask: .*differ")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_half_a_mask(prefix: str, suffix: str) -> None:
    """Without its index a mask used to count as absent, and a merge omitted it."""
    mask = write_mask(prefix, [4, 2, 6])
    os.unlink(f"{mask}.{suffix}")
    refused(prefix, rf"a_loss_mask\.{suffix}: No such file")
    os.mkdir(f"{mask}.{suffix}")
    refused(prefix, rf"a_loss_mask\.{suffix}: Is a directory")


def test_a_mask_of_another_size(prefix: str) -> None:
    mask = write_mask(prefix, [4, 2, 6])
    for num_bytes in (0, 11, 13):
        os.truncate(f"{mask}.bin", num_bytes)
        refused(prefix, rf"a_loss_mask\.bin: has {num_bytes} bytes")


def test_a_mask_that_the_sidecar_tells_of(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    """A merge without the mask would train prompts like answers."""
    jobs = Jobs(tmp_path, tiny_sentencepiece_model)
    corpus = CorpusSettings(format="chat", json_keys=("messages",))
    jobs.run(jobs.lines("a.jsonl", [{"instruction": "bana", "output": "kedo"}]), corpus=corpus)
    for path in tmp_path.glob("*_loss_mask.*"):
        path.unlink()
    given = tmp_path / "out_messages_document"
    with pytest.raises(UserError, match="no loss mask: .*out_messages_loss_mask.idx: the sidecar"):
        merge_datasets([given], tmp_path / "merged_document")
    with pytest.raises(UserError, match="no loss mask: .*out_messages_loss_mask.idx: the sidecar"):
        Inspection(given)

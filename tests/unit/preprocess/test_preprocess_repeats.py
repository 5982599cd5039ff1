"""Tests de-duplication across the parts of a job: the same bytes as the undivided job."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from preprocess_jobs import Jobs

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import dedup as repeats
from megatron_chatflow.preprocess import merge as merge_parts
from megatron_chatflow.preprocess.dedup import DuplicateMarks, hash_records, hashes_of
from megatron_chatflow.preprocess.merge import PartitionPolicy, find_datasets, merge_datasets
from megatron_chatflow.preprocess.settings import CorpusSettings

CHATS = CorpusSettings(format="chat", json_keys=("messages",))


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


def write_inputs(jobs: Jobs, num_files: int = 7) -> str:
    """Writes files that repeat lines of their own and of each other."""
    generator = random.Random(4)
    (jobs.folder / "in").mkdir()
    for number in range(num_files):
        texts = [f"bana {generator.randrange(60)} kedo" for _ in range(generator.randrange(40))]
        records = [{"text": t, "instruction": t, "output": f"luno {t}" * 2} for t in texts]
        jobs.lines(f"in/{number}.jsonl", [*records, b"{"])
    return str(jobs.folder / "in")


def contents(folder: Path, begin: str = "out_") -> dict[str, bytes]:
    """Returns all written files, with the keys of sidecars sorted."""
    return {
        path.name: json.dumps(json.loads(path.read_bytes()), sort_keys=True).encode()
        if path.suffix == ".json"
        else path.read_bytes()
        for path in sorted(folder.glob(f"{begin}*"))
    }


@pytest.mark.parametrize("corpus", [CorpusSettings(), CHATS])
def test_partitions_are_the_undivided_job(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, corpus: CorpusSettings
) -> None:
    for module, name, bound in [
        (repeats, "BLOCK", 5),
        (repeats, "HASHES_PER_BUCKET", 3),
        (merge_parts, "COPY_TOKENS", 50),
    ]:
        monkeypatch.setattr(module, name, bound)
    folder = write_inputs(jobs)
    options = {"corpus": corpus, "dedup": True, "append_eod": True}
    content = jobs.run(folder, **options)
    assert content["num_documents"] <= 60 and content["dropped"]["duplicate"] > 10
    whole = contents(jobs.folder)
    for num_partitions in (2, 9):
        jobs.run(folder, num_partitions=num_partitions, **options)
        assert contents(jobs.folder) == whole


def test_shards_of_a_job_array_are_compared_when_merged(jobs: Jobs) -> None:
    folder = write_inputs(jobs)
    jobs.run(folder, dedup=True, corpus=CHATS)
    whole = contents(jobs.folder)
    jobs.prefix = jobs.folder / "shards" / "en"
    for number in (2, 0, 3, 1):
        jobs.run(folder, dedup=True, corpus=CHATS, shard=(number, 4))
    prefixes = find_datasets([str(jobs.folder / "shards")])
    merge_datasets(prefixes, jobs.folder / "out_messages_document", overwrite=True)
    assert contents(jobs.folder) == whole
    Path(f"{prefixes[1]}.hashes").unlink()
    with pytest.raises(UserError, match="no hashes of .* create this partition again"):
        merge_datasets(prefixes, jobs.folder / "again_messages_document")
    jobs.run(folder, dedup=True, corpus=CHATS, shard=(1, 4), overwrite=False)  # follow the advice
    merge_datasets(prefixes, jobs.folder / "again_messages_document")
    assert not list(jobs.folder.glob("*.hashes"))


def test_parts_that_cannot_be_merged(jobs: Jobs) -> None:
    folder = write_inputs(jobs)
    jobs.prefix = jobs.folder / "shards" / "en"
    for number in range(3):
        jobs.run(folder, dedup=True, shard=(number, 3))
    jobs.prefix = jobs.folder / "other" / "en"
    jobs.run(folder, shard=(1, 3))
    first, second, third = find_datasets([str(jobs.folder / "shards")])
    (other,) = find_datasets([str(jobs.folder / "other")])
    output = jobs.folder / "merged_text_document"
    for prefixes, message in [
        ([first, third], "partition 1/3 of .* is missing.*--shard 1/3.*--allow-missing"),
        ([first, second, third, first], "the same partition twice"),
        ([first, other, third], "not from one job"),
    ]:
        with pytest.raises(UserError, match=message):
            merge_datasets(prefixes, output)
    num_documents = merge_datasets(
        [first, third], output, policy=PartitionPolicy(allow_missing=True)
    )
    assert num_documents > 0


def test_bad_lines_count_over_all_parts(jobs: Jobs) -> None:
    folder = write_inputs(jobs)  # a bad line in each of 7 files
    with pytest.raises(UserError, match="6.jsonl.*the first of more than 6"):
        jobs.run(folder, num_partitions=7, max_bad_lines=6)
    content = jobs.run(folder, num_partitions=7, max_bad_lines=7)
    assert (content["num_bad_lines"], content["max_bad_lines"]) == (7, 7)
    jobs.prefix = jobs.folder / "shards" / "en"
    for number in range(7):
        jobs.run(folder, shard=(number, 7), max_bad_lines=2)
    prefixes = find_datasets([str(jobs.folder / "shards")])
    with pytest.raises(UserError, match="too many bad lines: 7 in all partitions of .*more than 2"):
        merge_datasets(prefixes, jobs.folder / "m_text_document")
    merge_datasets(
        prefixes, jobs.folder / "m_text_document", policy=PartitionPolicy(max_bad_lines=7)
    )


def test_marks_every_repetition_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "BLOCK", 1 << 10)
    monkeypatch.setattr(repeats, "HASHES_PER_BUCKET", 1 << 10)
    generator = np.random.default_rng(1)
    parts = [generator.integers(0, 200_000, n) for n in (100_000, 0, 130_000)]
    paths = [tmp_path / str(number) for number in range(3)]
    for path, values in zip(paths, parts, strict=True):
        hashes = hashes_of(b"%d" % value for value in values)
        path.write_bytes(hash_records(hashes, values).tobytes())
    tracemalloc.start()
    found = DuplicateMarks(paths, [len(values) for values in parts], tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # of 5.5 MB of hashes
    everything = np.concatenate(parts)
    is_first = np.zeros(len(everything), np.bool_)
    is_first[np.unique(everything, return_index=True)[1]] = True
    begin = 0
    for number, values in enumerate(parts):
        marks = found.of_partition(number, 0, len(values))
        assert np.array_equal(marks, ~is_first[begin : begin + len(values)])
        assert found.num_repeated_bytes(number) == values[marks].sum()
        begin += len(values)
    found.close()
    assert len(list(tmp_path.iterdir())) == 3

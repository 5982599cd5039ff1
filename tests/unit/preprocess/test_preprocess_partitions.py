"""Tests that jobs in parts write the bytes of the undivided job, however often they are killed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from preprocess_jobs import Jobs

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import job
from megatron_chatflow.preprocess.job import split_files
from megatron_chatflow.preprocess.merge import find_datasets, merge_datasets
from megatron_chatflow.preprocess.pairs import PairSettings
from megatron_chatflow.preprocess.readers import InputFile
from megatron_chatflow.preprocess.settings import CorpusSettings

CORPORA = [
    CorpusSettings(json_keys=("text", "title")),
    CorpusSettings(format="pairs"),
]


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


def write_inputs(jobs: Jobs) -> str:
    (jobs.folder / "in").mkdir()
    for number in range(9):
        records = [
            {"text": f"bana {number} {k}", "title": "x" * (k % 3), "en": f"luno {k}", "zh": "kedo"}
            for k in range(number * 3 % 8)
        ]
        jobs.lines(f"in/{number}.jsonl", [*records, b"" if number else b"{"])
    (jobs.folder / "in" / "empty.jsonl").touch()
    return str(jobs.folder / "in")


def outputs(jobs: Jobs) -> dict[str, bytes]:
    """Returns all written files, with the keys of sidecars sorted."""
    files = sorted(path for path in jobs.folder.iterdir() if path.is_file())
    return {
        path.name: json.dumps(json.loads(path.read_bytes()), sort_keys=True).encode()
        if path.suffix == ".json"
        else path.read_bytes()
        for path in files
    }


@pytest.mark.parametrize("corpus", CORPORA)
def test_parts_merged_are_the_undivided_job(jobs: Jobs, corpus: CorpusSettings) -> None:
    folder = write_inputs(jobs)
    jobs.run(folder, corpus=corpus)
    whole = outputs(jobs)
    for num_partitions in (2, 5, 30):
        jobs.run(folder, corpus=corpus, num_partitions=num_partitions)
        assert outputs(jobs) == whole


def test_a_killed_job_goes_on(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills the job a dozen times, each at the end of a part. It still writes the same bytes."""
    folder = write_inputs(jobs)
    corpus = CORPORA[1]
    jobs.run(folder, corpus=corpus)
    whole = outputs(jobs)
    for path in jobs.folder.glob("out_*"):
        path.unlink()
    run_partition = job.run_partition
    num_started: list[int] = []

    class KilledError(Exception):
        pass

    def run_one_then_die(settings: Any, files: Sequence[InputFile], *others: Any) -> Any:
        num_started.append(settings.shard[0])
        content = run_partition(settings, files, *others)
        if len(num_started) in kills:
            raise KilledError
        return content

    monkeypatch.setattr(job, "run_partition", run_one_then_die)
    kills = {sum(range(1, k + 1)) for k in range(1, 13)}  # each attempt completes one more part
    for _ in range(12):
        with pytest.raises(KilledError):
            jobs.run(folder, corpus=corpus, num_partitions=13, overwrite=False)
        assert not (jobs.folder / "out_text_document.idx").exists()
    jobs.run(folder, corpus=corpus, num_partitions=13, overwrite=False)
    assert outputs(jobs) == whole


def test_finished_parts_are_kept_and_verified(jobs: Jobs) -> None:
    folder = write_inputs(jobs)
    jobs.run(folder, shard=(0, 2), overwrite=False)
    path = jobs.folder / "out_part00000of00002_text_document.bin"
    first = path.stat().st_mtime_ns, path.read_bytes()
    jobs.run(folder, shard=(0, 2), overwrite=False)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == first
    path.write_bytes(first[1][:-1] + b"\xff")
    jobs.run(folder, shard=(0, 2), overwrite=False)
    assert path.read_bytes() == first[1]
    for changes in (
        {"append_eod": True},
        {"corpus": CorpusSettings(invalid_utf8="replace")},
        {"corpus": CorpusSettings(encoding="gb18030")},
        {"corpus": CorpusSettings(format="pairs", pairs=PairSettings(columns=("2", "3")))},
    ):
        with pytest.raises(UserError, match="other output with this name"):
            jobs.run(folder, shard=(0, 2), overwrite=False, **changes)
    jobs.lines("in/0.jsonl", [{"text": "kedo"}] * 3)
    with pytest.raises(UserError, match="other output with this name"):
        jobs.run(folder, shard=(0, 2), overwrite=False)
    jobs.run(folder, shard=(0, 2), overwrite=True)
    assert path.read_bytes() != first[1]


def test_shards_of_a_job_array(jobs: Jobs) -> None:
    folder = write_inputs(jobs)
    jobs.run(folder)
    expected = Path(f"{jobs.prefix}_text_document.bin").read_bytes()
    (jobs.folder / "shards").mkdir()
    jobs.prefix = jobs.folder / "shards" / "en"
    for number in (2, 0, 3, 1):
        jobs.run(folder, shard=(number, 4))
    merged = jobs.folder / "merged_text_document"
    merge_datasets(find_datasets([str(jobs.folder / "shards")]), merged)
    assert Path(f"{merged}.bin").read_bytes() == expected


def test_split_is_by_bytes_and_in_order() -> None:
    files = [
        InputFile(Path(str(k)), str(k), "lines", size) for k, size in enumerate([9, 1, 1, 1, 8])
    ]
    assert [[int(f.name) for f in part] for part in split_files(files, 3)] == [[0], [1, 2, 3], [4]]
    for num_partitions in (1, 2, 7):
        parts = split_files(files, num_partitions)
        assert len(parts) == num_partitions
        assert [file for part in parts for file in part] == files


def test_mistakes(jobs: Jobs) -> None:
    folder = write_inputs(jobs)
    for shard in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(UserError, match="the first shard is 0/"):
            jobs.run(folder, shard=shard)
    with pytest.raises(UserError, match="num_partitions: 0"):
        jobs.run(folder, num_partitions=0)
    with pytest.raises(UserError, match="cannot be split into partitions: <stdin>"):
        jobs.run(folder, "-", num_partitions=2)
    jobs.lines("none.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match="no document left"):
        jobs.run(str(jobs.folder / "none.jsonl"), num_partitions=2)

"""Tests preprocessing from and to an S3 server whose connections fail."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore
from parallel_files import PAIRS, aligned_text, read_pairs, write_opus_archive
from preprocess_jobs import Jobs

from megatron_chatflow import remote
from megatron_chatflow.cli import inspect, merge
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import job
from megatron_chatflow.preprocess.readers import find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings

PREFIX = "s3://corpora/data/out"


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path, object_store: ObjectStore) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


def records(count: int = 400) -> list[dict[str, str]]:
    draw = random.Random(1)
    words = ["bana", "luno", "kedo", "rima"]
    return [{"text": " ".join(draw.choices(words, k=50))} for _ in range(count)]


def run_remotely(jobs: Jobs, *inputs: str, **options: Any) -> Any:
    jobs.prefix = PREFIX  # type: ignore[assignment]
    return jobs.run(*inputs, **{"overwrite": False, **options})


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("out_*")}


def remote_files(store: ObjectStore) -> dict[str, bytes]:
    names = [name for name in store.names() if name.startswith("data/")]
    return {name.removeprefix("data/"): store.get(name) for name in names}


def put_corpus(jobs: Jobs, store: ObjectStore) -> None:
    """Writes the same files to a local folder and to the store."""
    (jobs.folder / "in").mkdir()
    lines = [json.dumps(record).encode() + b"\n" for record in records()]
    contents = {
        "a.jsonl": b"".join(lines[:100]),
        "b.jsonl.gz": gzip.compress(b"".join(lines[100:250])),
        "c.jsonl": b"\xef\xbb\xbf" + b"".join(lines[250:]).replace(b"\n", b"\r\n"),
        "empty.jsonl": b"",
        "one.txt": b"bana luno",
        "README.txt": b"a corpus",
        ".hidden.jsonl": lines[0],
    }
    for name, content in contents.items():
        (jobs.folder / "in" / name).write_bytes(content)
        store.put(f"in/{name}", content)


def test_remote_input_and_output_have_the_bytes_of_local_ones(
    jobs: Jobs, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 10_000)
    put_corpus(jobs, object_store)
    jobs.run(str(jobs.folder / "in"))
    object_store.proxy.fail_next(5_000, None, 12_000, 0)
    run_remotely(jobs, "s3://corpora/in")
    assert object_store.proxy.num_cut >= 1
    assert remote_files(object_store) == local_files(jobs.folder)
    assert not list((remote.cache_folder() / "outputs").glob("*/*"))


def test_globs_and_single_files(jobs: Jobs, object_store: ObjectStore) -> None:
    put_corpus(jobs, object_store)

    def names(*inputs: str) -> list[str]:
        return [file.name for file in find_inputs(inputs)]

    assert names("s3://corpora/in/*.jsonl") == ["a.jsonl", "c.jsonl", "empty.jsonl"]
    assert names("s3://corpora/in/b.jsonl.gz", "s3://corpora/in/a.jsonl") == [
        "b.jsonl.gz",
        "a.jsonl",
    ]
    assert names("s3://corpora/**/one.txt") == ["one.txt"]
    assert names(f"file://{jobs.folder}/in/a.jsonl") == ["a.jsonl"]
    with pytest.raises(UserError, match="no input: s3://corpora/nothing: no such file"):
        names("s3://corpora/nothing")
    with pytest.raises(UserError, match="input given twice"):
        names("s3://corpora/in/a.jsonl", "s3://corpora/in")
    object_store.put("in/x.avro", b"a,b")
    with pytest.raises(UserError, match=r"cannot read: 1 files in s3://corpora/in: 1 .avro"):
        names("s3://corpora/in")
    with pytest.raises(UserError, match=r"unknown kind of input: s3://corpora/in/x.avro"):
        names("s3://corpora/in/x.avro")


def test_a_dataset_beside_its_sidecar_is_not_input(object_store: ObjectStore) -> None:
    for name in ("x_text_document.json", "x_text_document.idx", "a.jsonl"):
        object_store.put(f"in/{name}", b"")
    assert [file.name for file in find_inputs(["s3://corpora/in"])] == ["a.jsonl"]


def test_saved_data_sets(jobs: Jobs, object_store: ObjectStore) -> None:
    """Folders and globs of URLs leave out caches and refuse splits as local folders do."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(records(30))
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    state = json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}).encode()
    for split in ("train", "test"):
        object_store.put(f"in/{split}/data-0.arrow", content)
        object_store.put(f"in/{split}/cache-1.arrow", content)
        object_store.put(f"in/{split}/state.json", state)

    def names(*inputs: str) -> list[str]:
        return [file.name for file in find_inputs(inputs)]

    assert names("s3://corpora/in/train") == ["data-0.arrow"]
    assert names("s3://corpora/in") == ["test/data-0.arrow", "train/data-0.arrow"]
    assert names("s3://corpora/in/train/*.arrow") == ["data-0.arrow"]
    assert names("s3://corpora/in/train/cache-1.arrow") == ["cache-1.arrow"]
    object_store.put("in/dataset_dict.json", b'{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"several splits: s3://corpora/in: .*corpora/in/train"):
        names("s3://corpora/in")
    assert run_remotely(jobs, "s3://corpora/in/train")["num_documents"] == 30
    object_store.put("in/train/data-0.arrow", content[:-8])
    with pytest.raises(UserError, match="data-0.arrow: it is truncated"):
        run_remotely(jobs, "s3://corpora/in/train", overwrite=True)
    object_store.put("in/train/state.json", state.replace(b"data-0", b"data-1"))
    with pytest.raises(UserError, match=r"incomplete data set: .*train: data-1.arrow is missing"):
        names("s3://corpora/in/train")


def test_parquet_is_read_in_place(jobs: Jobs, object_store: ObjectStore) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = jobs.folder / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records()), path)
    jobs.run(str(path))
    url = object_store.put("in/a.parquet", path.read_bytes())
    object_store.proxy.fail_next(2_000, 500)
    run_remotely(jobs, url)
    assert remote_files(object_store) == local_files(jobs.folder)


def test_pairs_with_a_loss_mask(jobs: Jobs, object_store: ObjectStore) -> None:
    corpus = CorpusSettings(format="pairs")
    content = b"".join(b"bana %d\tluno %d\n" % (k, k) for k in range(20))
    (jobs.folder / "a.tsv").write_bytes(content)
    jobs.run(str(jobs.folder / "a.tsv"), corpus=corpus)
    run_remotely(jobs, object_store.put("in/a.tsv", content), corpus=corpus)
    found = remote_files(object_store)
    assert found == local_files(jobs.folder)
    assert f"{loss_mask_prefix('out_text_document').name}.bin" in found


def test_aligned_files_and_archives(tmp_path: Path, object_store: ObjectStore) -> None:
    archive = write_opus_archive(tmp_path / "en-zh.txt.zip", PAIRS)
    for side, name in enumerate(("a.en", "a.zh")):
        object_store.put(f"in/{name}", aligned_text(PAIRS, side))
    assert read_pairs("s3://corpora/in") == (PAIRS, {})
    assert read_pairs("s3://corpora/in/a.en", "s3://corpora/in/a.zh") == (PAIRS, {})
    url = object_store.put("in/en-zh.txt.zip", archive.read_bytes())
    assert read_pairs(url) == (PAIRS, {})
    assert read_pairs("s3://corpora/in") == (PAIRS + PAIRS, {})


def test_existing_output_is_kept(jobs: Jobs, object_store: ObjectStore) -> None:
    source = jobs.lines("a.jsonl", records(20))
    run_remotely(jobs, source)
    before = remote_files(object_store)
    with pytest.raises(UserError, match="output exists: s3://corpora/data/out_text_document.idx"):
        run_remotely(jobs, jobs.lines("b.jsonl", records(10)))
    assert remote_files(object_store) == before
    run_remotely(jobs, jobs.lines("b.jsonl", records(10)), overwrite=True)
    assert remote_files(object_store) != before


def test_a_failed_upload_continues(
    jobs: Jobs, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jobs.lines("a.jsonl", records())
    jobs.run(source)
    upload, sent = remote.upload, []

    def fail_at_json(path: Path, url: str, *arguments: Any) -> None:
        sent.append(path.name)
        if path.suffix == ".json":
            object_store.proxy.go_down()
        upload(path, url, *arguments)

    monkeypatch.setattr(remote, "upload", fail_at_json)
    with pytest.raises(UserError, match=r"cannot write: .*document.json.*output is kept in"):
        run_remotely(jobs, source)
    object_store.proxy.is_down = False
    assert list(remote_files(object_store)) == ["out_text_document.bin"]

    monkeypatch.setattr(remote, "upload", lambda *a: (sent.append(a[0].name), upload(*a)))
    monkeypatch.setattr(job, "preprocess_files", None)  # nothing is built again
    sent.clear()
    run_remotely(jobs, source)
    assert sent == ["out_text_document.json", "out_text_document.idx"]
    assert remote_files(object_store) == local_files(jobs.folder)


def test_an_output_that_appears_during_the_work_is_not_replaced(
    jobs: Jobs, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jobs.lines("a.jsonl", records())
    work = job.preprocess_files

    def with_another_job(*arguments: Any, **options: Any) -> Any:
        found = work(*arguments, **options)
        object_store.put("data/out_text_document.idx", b"of another job")
        return found

    monkeypatch.setattr(job, "preprocess_files", with_another_job)
    with pytest.raises(UserError, match=r"output exists: .*another job has written it meanwhile"):
        run_remotely(jobs, source)
    assert remote_files(object_store) == {"out_text_document.idx": b"of another job"}


def test_an_unwritable_store_is_found_before_the_work(
    jobs: Jobs, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "preprocess_files", None)
    source = jobs.lines("a.jsonl", records(5))
    jobs.prefix = "s3://nowhere/out"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"s3://nowhere/out.partial: the bucket does not exist"):
        jobs.run(source, overwrite=False)
    jobs.prefix = "https://host/out"  # type: ignore[assignment]
    with pytest.raises(UserError, match="web servers can only be read"):
        jobs.run(source, overwrite=False)
    jobs.prefix = "s3://corpora/out"  # type: ignore[assignment]
    with pytest.raises(UserError, match="--ray needs a folder that all machines share"):
        jobs.run(source, overwrite=False, ray="auto")


def write_parts(jobs: Jobs, store: ObjectStore) -> None:
    for number in range(4):
        lines = b"".join(json.dumps(r).encode() + b"\n" for r in records()[number::4])
        (jobs.folder / f"{number}.jsonl").write_bytes(lines)
        store.put(f"in/{number}.jsonl", lines)


def test_partitions_go_on_and_are_merged(
    jobs: Jobs, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts(jobs, object_store)
    jobs.run(str(jobs.folder / "*.jsonl"), num_partitions=4)
    build, built = job.preprocess_files, []

    def killed(settings: Any, *arguments: Any) -> Any:
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(settings.shard)
        return build(settings, *arguments)

    monkeypatch.setattr(job, "preprocess_files", killed)
    with pytest.raises(KeyboardInterrupt):
        run_remotely(jobs, "s3://corpora/in", num_partitions=4)
    assert remote_files(object_store) == {}
    built.clear()
    monkeypatch.setattr(
        job, "preprocess_files", lambda *a: (built.append(a[0].shard), build(*a))[1]
    )
    run_remotely(jobs, "s3://corpora/in", num_partitions=4)
    assert built == [(2, 4), (3, 4)]
    assert remote_files(object_store) == local_files(jobs.folder)


@pytest.mark.parametrize("dedup", [False, True])
def test_shards_of_several_machines_are_merged(
    jobs: Jobs, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, dedup: bool
) -> None:
    write_parts(jobs, object_store)
    jobs.run(str(jobs.folder / "*.jsonl"), num_partitions=4, dedup=dedup)
    for number in range(4):
        monkeypatch.setenv(remote.CACHE_VARIABLE, str(jobs.folder / f"machine_{number}"))
        run_remotely(jobs, "s3://corpora/in", shard=(number, 4), dedup=dedup)
    with monkeypatch.context() as context:  # a requeued task finds its shard finished
        context.setattr(job, "preprocess_files", None)
        run_remotely(jobs, "s3://corpora/in", shard=(2, 4), dedup=dedup)
        with pytest.raises(UserError, match="output exists"):
            run_remotely(jobs, "s3://corpora/in", shard=(2, 4), dedup=dedup, append_eod=True)
    monkeypatch.setattr(job, "preprocess_files", None)
    run_remotely(jobs, "s3://corpora/in", num_partitions=4, dedup=dedup)
    assert remote_files(object_store) == local_files(jobs.folder)


def test_merge_and_inspect(
    jobs: Jobs,
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_parts(jobs, object_store)
    for number in range(2):
        jobs.prefix = f"s3://corpora/parts/{number}"  # type: ignore[assignment]
        jobs.run(f"s3://corpora/in/{number}.jsonl", overwrite=False)
        jobs.prefix = jobs.folder / f"{number}"
        jobs.run(str(jobs.folder / f"{number}.jsonl"))
    merged = ["--output-prefix", "s3://corpora/data/out_text_document"]
    monkeypatch.setattr("sys.argv", ["merge", "--input", "s3://corpora/parts", *merged])
    merge.main()
    local = [str(jobs.folder / f"{number}_text_document") for number in range(2)]
    target = str(jobs.folder / "out_text_document")
    monkeypatch.setattr("sys.argv", ["merge", "--input", *local, "--output-prefix", target])
    merge.main()
    assert remote_files(object_store) == local_files(jobs.folder)
    url = "s3://corpora/data/out_text_document"
    monkeypatch.setattr("sys.argv", ["inspect", url, target])
    assert inspect.main() == 0
    assert "the datasets are equal" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["merge", "--input", "s3://corpora/parts", *merged])
    with pytest.raises(UserError, match="output exists: s3://corpora/data/out_text_document.idx"):
        merge.main()

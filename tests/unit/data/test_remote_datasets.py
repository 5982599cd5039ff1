"""Tests local copies of datasets on an S3 server, and runs that read them."""

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest
import yaml
from object_store import ObjectStore
from preprocess_jobs import make_chats
from tiny_run import TinyRun

from megatron_chatflow import remote
from megatron_chatflow.config import RunConfig, load_config
from megatron_chatflow.data.remote_dataset import fetch_dataset
from megatron_chatflow.errors import UserError
from megatron_chatflow.remote import CachedPath
from megatron_chatflow.training.inputs import open_inputs
from megatron_chatflow.training.remote_inputs import fetch_inputs


@pytest.fixture
def chats(tmp_path: Path, tiny_sentencepiece_model: Path, object_store: ObjectStore) -> str:
    """Writes a dataset with a loss mask and a sidecar; returns its URL."""
    prefix = make_chats(tmp_path, tiny_sentencepiece_model)
    for path in tmp_path.glob("a_messages*"):
        object_store.put(f"tokens/{path.name}", path.read_bytes())
    return f"s3://corpora/tokens/{prefix.name}"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("a_messages*")}


def test_a_dataset_is_copied_once_with_mask_and_sidecar(
    chats: str, tmp_path: Path, object_store: ObjectStore
) -> None:
    object_store.proxy.fail_next(100, None, 0)
    prefix = fetch_dataset(chats)
    assert prefix == remote.cache_folder() / "s3/corpora/tokens/a_messages_document"
    assert files(prefix.parent) == files(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in prefix.parent.iterdir()}
    assert fetch_dataset(chats) == prefix
    assert {path: path.stat().st_mtime_ns for path in prefix.parent.iterdir()} == before


def test_a_file_that_does_not_match_the_sidecar_gets_no_name(
    chats: str, object_store: ObjectStore
) -> None:
    name = "tokens/a_messages_document.bin"
    content = bytearray(object_store.get(name))
    content[3] ^= 1
    object_store.put(name, bytes(content))
    with pytest.raises(UserError, match=f"s3://corpora/{name}: its SHA-256 is not the recorded"):
        fetch_dataset(chats)
    assert not (remote.cache_folder() / "s3/corpora" / name).exists()


def test_a_new_version_replaces_the_copy(
    chats: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    prefix = fetch_dataset(chats)
    for path in tmp_path.glob("a_messages*"):  # a smaller dataset without mask and sidecar
        key = f"tokens/{path.name}"
        object_store.client().delete_object(Bucket="corpora", Key=key)
    for suffix in (".bin", ".idx"):
        object_store.put(f"tokens/a_messages_document{suffix}", b"new")
    fetch_dataset(chats)
    assert files(prefix.parent) == {
        "a_messages_document.bin": b"new",
        "a_messages_document.idx": b"new",
    }


def test_a_copy_is_used_if_the_store_cannot_be_reached(
    chats: str,
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 2)
    prefix = fetch_dataset(chats)
    object_store.proxy.go_down()
    assert fetch_dataset(chats) == prefix
    assert "using the copy from an earlier run" in caplog.text
    with pytest.raises(UserError, match="cannot read: s3://corpora/other.json"):
        fetch_dataset("s3://corpora/other")


def test_a_missing_dataset_is_named(object_store: ObjectStore) -> None:
    with pytest.raises(UserError, match=r"s3://corpora/none.idx: no such file: check the URL"):
        fetch_dataset("s3://corpora/none")


def remote_config(run: TinyRun, store: ObjectStore) -> RunConfig:
    """Moves the datasets of a run to the store and returns the configuration that names them."""
    settings = yaml.safe_load(run.config.read_text())
    for source in settings["data"]["sources"].values():
        prefix = Path(source["paths"][0])
        for suffix in (".bin", ".idx"):
            store.put(f"tokens/{prefix.name}{suffix}", Path(f"{prefix}{suffix}").read_bytes())
        source["paths"] = [f"s3://corpora/tokens/{prefix.name}"]
    path = run.folder / "remote.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(path)


def test_a_run_reads_the_same_samples(tiny_run: TinyRun, object_store: ObjectStore) -> None:
    config = remote_config(tiny_run, object_store)
    fetch_inputs(config)
    local, copied = open_inputs(load_config(tiny_run.config)), open_inputs(config)
    for one, other in zip(local.sources, copied.sources, strict=True):
        assert one.fingerprint() == other.fingerprint()
        assert one.sample(3).tokens.tolist() == other.sample(3).tokens.tolist()


def test_one_process_of_a_node_copies(
    tiny_run: TinyRun, object_store: ObjectStore, tmp_path: Path
) -> None:
    flags = ["--save", str(tmp_path / "run"), "--save-remote", "s3://corpora/run"]
    remote_config(tiny_run, object_store)
    config = load_config(tiny_run.folder / "remote.yaml", flags)
    object_store.proxy.num_bytes = 0
    fetch_inputs(config, rank=1, local_rank=1)
    assert object_store.proxy.num_bytes == 0 and not (tmp_path / "run").exists()
    fetch_inputs(config, rank=2, local_rank=0)  # of the second node
    assert (remote.cache_folder() / "s3/corpora/tokens/first_text_document.bin").exists()
    assert not (tmp_path / "run").exists()
    fetch_inputs(config, rank=0, local_rank=0)
    assert (tmp_path / "run" / "run_id.txt").exists()


def test_a_run_that_loads_from_its_folder_on_the_store_takes_its_id(
    tiny_run: TinyRun, object_store: ObjectStore, tmp_path: Path
) -> None:
    url = "s3://corpora/run"
    object_store.put("run/run_id.txt", b"theirs\n")
    flags = ["--save", str(tmp_path / "run"), "--save-remote", url, "--load", url]
    fetch_inputs(load_config(tiny_run.config, flags))
    assert (tmp_path / "run" / "run_id.txt").read_bytes() == b"theirs\n"


def test_a_cache_without_file_locks_is_refused(chats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=f"no file locks.*set {remote.CACHE_VARIABLE}"):
        fetch_dataset(chats)


def test_a_mixed_copy_is_not_used_when_the_store_is_down(
    chats: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 1)
    prefix = fetch_dataset(chats)
    object_store.proxy.go_down()
    assert fetch_dataset(chats) == prefix
    object_store.proxy.is_down = False
    for path in prefix.parent.glob("a_messages*.json"):
        object_store.client().delete_object(Bucket="corpora", Key=f"tokens/{path.name}")
    for suffix in (".bin", ".idx"):
        object_store.put(f"tokens/a_messages_document{suffix}", b"new")
    real = remote.download

    def interrupted(file: remote.RemoteFile, path: Path, **options: Any) -> bool:
        if path.suffix == ".bin":
            object_store.proxy.go_down()
        return real(file, path, **options)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot read"):
        patch.setattr(remote, "download", interrupted)
        fetch_dataset(chats)
    with pytest.raises(UserError, match="cannot read"):
        fetch_dataset(chats)
    object_store.proxy.is_down = False
    fetch_dataset(chats)
    assert prefix.with_suffix(".bin").read_bytes() == b"new"


def test_the_recorded_configuration_has_the_urls(
    tiny_run: TinyRun, object_store: ObjectStore
) -> None:
    config = remote_config(tiny_run, object_store)
    path = config.data.sources["first"].paths[0]
    assert isinstance(path, CachedPath)
    text = config.to_yaml()
    assert "s3://corpora/tokens/first_text_document" in text
    assert str(remote.cache_folder()) not in text
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--save", "s3://b/run"],
            "checkpoint.save: s3://b/run: is a URL, and only local paths are supported here: a run "
            "saves to a local folder, whose checkpoints --save-remote copies",
        ),
        (["--load", "s3://k:s@b/run"], "checkpoint.load: s3://***@b/run: has credentials"),
        (["--save-remote", "/local"], "checkpoint.save_remote: must be a URL"),
        (["--save-remote", "s3://b/*"], "checkpoint.save_remote: s3://b/*: must not contain *"),
        (["--save-remote", "s3://b/[a]"], "checkpoint.save_remote: s3://b/[a]: must not contain *"),
        (
            ["--save-remote", "s3://b/a::b"],
            "checkpoint.save_remote: s3://b/a::b: must not contain",
        ),
        (["--save-remote", "hf://o/m"], "checkpoint.save_remote: hf://o/m: every file would be"),
        (["--load", "s3://b/*"], "checkpoint.load: s3://b/*: must not contain *"),
        (["--load", "https://h/x?a=b"], "checkpoint.load: https://h/x?***: must not contain *"),
        (["--save-remote", "https://h/run"], "checkpoint.save_remote: https://h/run: web servers"),
        (["--save-remote", "s3://b/run"], "checkpoint.save_remote: needs checkpoint.save"),
    ],
)
def test_wrong_urls_in_a_configuration(tiny_run: TinyRun, flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(tiny_run.config, flags)
    assert str(caught.value).startswith(message)


def test_a_hugging_face_model_is_copied(
    tiny_run: TinyRun, random_llama: Path, object_store: ObjectStore
) -> None:
    for path in random_llama.iterdir():
        object_store.put(f"models/tiny/{path.name}", path.read_bytes())
    object_store.put("models/tiny/pytorch_model.bin", b"not read")
    settings = yaml.safe_load(tiny_run.config.read_text())
    del settings["model"], settings["tokenizer"]
    path = tiny_run.folder / "huggingface.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = load_config(path, ["--load-hf", "s3://corpora/models/tiny"])
    assert config.model == load_config(path, ["--load-hf", str(random_llama)]).model
    fetch_inputs(config)
    copy = config.checkpoint.load_hf
    assert isinstance(copy, CachedPath) and copy.url == "s3://corpora/models/tiny"
    assert (copy / "model.safetensors").read_bytes() == (
        random_llama / "model.safetensors"
    ).read_bytes()
    assert not (copy / "pytorch_model.bin").exists()
    with pytest.raises(UserError, match="s3://corpora/none: has no config.json"):
        load_config(path, ["--load-hf", "s3://corpora/none"])


def test_a_dry_run_copies_no_checkpoint(
    tiny_run: TinyRun,
    object_store: ObjectStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    object_store.put("runs/a/latest_checkpointed_iteration.txt", b"20\n")
    root = str(tmp_path / "run")
    flags = ["--save", root, "--load", root, "--save-remote", "s3://corpora/runs/a/"]
    fetch_inputs(load_config(tiny_run.config, flags), is_dry_run=True)
    assert f"will first copy iteration 20 from s3://corpora/runs/a to {root}" in caplog.text
    assert not (tmp_path / "run").exists()

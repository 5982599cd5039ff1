"""Tests that datasets with changed bytes of the same size are refused, also on resume."""

import json
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TinyRun, write_checkpoint_state

from megatron_chatflow.data import source as source_module
from megatron_chatflow.data.contents import check_contents
from megatron_chatflow.data.fingerprint import block_hash
from megatron_chatflow.data.indexed import HEADER
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import preprocess, settings_of_options
from megatron_chatflow.preprocess.merge import merge_datasets
from megatron_chatflow.training.dry_run import dry_run
from megatron_chatflow.training.inputs import open_inputs, verify_data


def swap_halves(path: str | Path) -> None:
    """Exchanges the halves of a file in place."""
    content = Path(path).read_bytes()
    half = len(content) // 4 * 2  # whole tokens
    swapped = content[half : 2 * half] + content[:half] + content[2 * half :]
    assert swapped != content
    with Path(path).open("r+b") as file:
        file.write(swapped)


def merge_first_documents(path: Path) -> None:
    """Makes the first document of an index empty and gives its sequence to the second."""
    with path.open("r+b") as file:
        file.seek(HEADER.size - 16)
        (num_sequences,) = struct.unpack("<Q", file.read(8))
        file.seek(HEADER.size + 12 * num_sequences + 8)
        file.write(struct.pack("<q", 0))


def forget(prefix: Path, *keys: str) -> None:
    """Removes keys from a sidecar, as if an earlier version had written it."""
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_bytes())
    for key in keys:
        del content[key]
    path.write_text(json.dumps(content))


def write_chats(tiny_run: TinyRun, folder: Path, answers: list[str]) -> Path:
    """Preprocesses made-up chats and returns the prefix of the dataset."""
    records = [{"instruction": f"bana {k}", "output": text} for k, text in enumerate(answers)]
    (folder / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    options = {"inputs": [str(folder / "a.jsonl")], "output_prefix": str(folder / "out")}
    options |= {"format": "chat", "append_eod": True, "overwrite": True, "num_workers": 1}
    preprocess(settings_of_options({**options, "tokenizer_model": str(tiny_run.tokenizer_model)}))
    return folder / "out_messages_document"


@pytest.fixture
def chats(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """Creates chats with a loss mask and a sidecar."""
    return write_chats(tiny_run, tmp_path, ["kedo luno" * (k % 9 + 1) for k in range(60)])


def uses(prefix: Path, **fields: Any) -> dict[str, Any]:
    """Returns changes that make the tiny run's first source read these chats."""
    return {"data__sources__first": {"paths": [str(prefix)], "loss": "response", **fields}}


@pytest.mark.parametrize("name", ["bin", "idx", "loss_mask_bin"])
def test_a_start_compares_with_the_sidecar(make_config, chats: Path, name: str) -> None:
    config = make_config(**uses(chats))
    open_inputs(config)
    path = Path(f"{loss_mask_prefix(chats)}.bin" if "mask" in name else f"{chats}.{name}")
    if name == "idx":
        merge_first_documents(path)
    else:
        swap_halves(path)
    place = r"data\.sources\.first\.paths\[0\]"
    message = rf"{place}: wrong contents: {path}: does not match the hash in .*json"
    with pytest.raises(UserError, match=message):
        open_inputs(config)
    with pytest.raises(UserError, match=f"wrong contents: {path}"):
        merge_datasets([chats], chats.with_name("merged_document"))


def test_validation_data_is_compared_as_well(make_config, chats: Path, tiny_run: TinyRun) -> None:
    first = str(tiny_run.folder / "first_text_document")
    changes = {"data__sources__first": {"paths": [first], "validation_paths": [str(chats)]}}
    swap_halves(f"{chats}.bin")
    open_inputs(make_config(**changes, train__eval_interval=None))
    with pytest.raises(UserError, match=r"first\.validation_paths\[0\]: wrong contents"):
        open_inputs(make_config(**changes, train__eval_interval=5, train__eval_iters=1))


@pytest.mark.parametrize("sidecar", ["of an earlier version", "none"])
@pytest.mark.parametrize("name", ["bin", "loss_mask_bin"])
def test_a_resume_compares_with_the_checkpoint(
    make_config, chats: Path, tmp_path: Path, sidecar: str, name: str
) -> None:
    if sidecar == "none":
        Path(f"{chats}.json").unlink()
    else:
        forget(chats, "block_hash")
    config = make_config(**uses(chats))
    write_checkpoint_state(config, tmp_path / "run")
    load = {"checkpoint__load": str(tmp_path / "run")}
    assert open_inputs(make_config(**uses(chats), **load)).resumed is not None
    # Files that the loss setting does not read are not compared.
    assert open_inputs(make_config(**uses(chats, loss="all"), **load)).resumed is not None
    swap_halves(f"{loss_mask_prefix(chats)}.bin" if "mask" in name else f"{chats}.bin")
    open_inputs(config)  # a fresh start has nothing to compare them with
    message = r"data\.sources\.first\.paths\[0\]: .*(the content differs from when|is not the data)"
    with pytest.raises(UserError, match=message) as caught:
        open_inputs(make_config(**uses(chats), **load))
    assert "--finetune" in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoints_of_earlier_versions_are_resumed(
    make_config, chats: Path, tmp_path: Path
) -> None:
    """They have no hashes of sample blocks. The next checkpoint records all of them."""
    config = make_config(**uses(chats))
    write_checkpoint_state(config, tmp_path / "run")
    state = tmp_path / "run" / "iter_0000005" / "state.json"
    content = json.loads(state.read_bytes())
    recorded = [source.pop("block_hash") for source in content["sources"].values()]
    assert recorded[0] == [json.loads(Path(f"{chats}.json").read_bytes())["block_hash"]]
    state.write_text(json.dumps(content))
    inputs = open_inputs(make_config(**uses(chats), checkpoint__load=str(tmp_path / "run")))
    assert [source["block_hash"] for source in inputs.state.sources.values()] == recorded


def test_a_copy_has_the_same_fingerprint(make_config, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for path in tmp_path.glob("out_*"):
        shutil.copy(path, tmp_path / "copy")
    states = [
        open_inputs(make_config(**uses(p))).state for p in (chats, tmp_path / "copy" / chats.name)
    ]
    assert states[0].sources == states[1].sources


def test_all_bytes_are_compared_on_request(make_config, tiny_run: TinyRun, tmp_path: Path) -> None:
    """Changes a byte between the sample blocks."""
    chats = write_chats(tiny_run, tmp_path, ["kedo luno " * 40] * 6000)
    path = Path(f"{chats}.bin")
    before, num_bytes = block_hash(path), path.stat().st_size
    assert num_bytes > 1 << 20
    with path.open("r+b") as file:
        file.seek((num_bytes - 4096) // 63 - 4)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert block_hash(path) == before
    config = make_config(**uses(chats), data__data_verify=True)
    inputs = open_inputs(config)
    message = rf"data\.sources\.first\.paths\[0\]: wrong contents: {path}"
    with pytest.raises(UserError, match=message):
        verify_data(config, inputs)
    with pytest.raises(UserError, match=message):
        dry_run(config)
    # The processes of a node share the files: one finds the change, the other reads the rest.
    refused = []
    for part in range(2):
        try:
            verify_data(config, inputs, part=part, num_parts=2)
        except UserError:
            refused.append(part)
    assert len(refused) == 1


def test_datasets_without_a_sidecar_cannot_be_verified(
    make_config, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(data__data_verify=True)
    verify_data(config, open_inputs(config))
    assert "--data-verify: 2 datasets have no .json" in caplog.text


def test_files_overwritten_during_the_run(
    make_config, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_CHECK_SECONDS", 0.0)
    source = open_inputs(make_config(**uses(chats))).sources[0]
    time.sleep(0.001)
    source.check_files()
    os.utime(f"{chats}.bin")  # only its time is changed
    source.check_files()
    swap_halves(f"{chats}.bin")
    os.utime(f"{chats}.bin", ns=(1, 1))
    with pytest.raises(UserError, match="first: .*bin: changed during the run, with the same size"):
        source.check_files()


def test_a_file_that_cannot_be_read_is_named(make_config, chats: Path) -> None:
    config = make_config(**uses(chats))
    inputs = open_inputs(config)
    Path(f"{chats}.bin").unlink()
    with pytest.raises(UserError, match=r"first\.paths\[0\]: cannot read: .*bin: No such file"):
        check_contents(config.data, [inputs.sources])
    with pytest.raises(UserError, match=r"first\.paths\[0\]: .*bin: No such file"):
        verify_data(config, inputs)

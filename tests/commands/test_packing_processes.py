"""Tests packing by several processes, and the memory that it takes."""

import multiprocessing
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.data.packing import build_once
from megatron_chatflow.data.sidecar import loss_mask_prefix


@pytest.mark.parametrize("shortest", [2, 34], ids=["many_a_sample", "one_a_sample"])
def test_planning_takes_less_than_24_bytes_a_document(tmp_path, shortest):
    """Measures the peak of all memory, including mapped files, in another process."""
    prefix, num_documents = tmp_path / "x_document", 1_000_000
    lengths = np.random.default_rng(1).integers(shortest, 66, num_documents).astype(np.int32)
    for name in (prefix, loss_mask_prefix(prefix)):
        writer = IndexedDatasetWriter(name, np.uint8)
        writer.add_documents(np.ones(lengths.sum(), np.uint8), lengths)
        writer.finalize()
    script = """
import sys
from megatron_chatflow.data.mapped_file import release_pages
from megatron_chatflow.data.packing import cached_packing
from megatron_chatflow.data.samples import open_token_file

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

file = open_token_file(sys.argv[1], with_loss_mask=True)
for split, holdout_every in (("validation", 100), ("train", None)):  # the first loads the code
    for array in (file.document_indices, file.sequence_pointers, file.loss_mask):
        release_pages(array)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak begins anew
    before = memory("VmRSS")
    packing = cached_packing([file], [{}], split, holdout_every, 64)
print(len(packing.documents), memory("VmHWM") - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(prefix)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    num_packed, peak = map(int, result.stdout.split())
    assert num_packed == num_documents
    assert peak / num_documents < 24


def _build_in_process(folder, number, barrier):
    def build():
        (folder / f"built_by_{number}").touch()
        time.sleep(0.3)
        return "content"

    def save(content):
        beside = folder / f"target.{number}"
        beside.write_text(content)
        beside.rename(target)

    target = folder / "target"
    barrier.wait()
    content = build_once(
        target,
        load=lambda: target.read_text() if target.exists() else None,
        build=build,
        save=save,
    )
    (folder / f"got_{content}_{number}").touch()


def test_one_process_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=_build_in_process, args=(tmp_path, number, barrier))
        for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("built_by_*"))) == 1
    assert len(list(tmp_path.glob("got_content_*"))) == 4
    assert not list(tmp_path.glob("*.lock"))

"""Tests settings of a process that only an interpreter of its own can show."""

import ctypes
import subprocess
import sys

import pytest

SETTINGS = """
import os, torch
from megatron_chatflow.runtime.launch import use_deterministic_algorithms
use_deterministic_algorithms()
assert torch.are_deterministic_algorithms_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
assert os.environ["NCCL_ALGO"] == "Ring"
"""


def test_it_sets_all_that_it_needs() -> None:
    subprocess.run([sys.executable, "-c", SETTINGS], check=True)


MIB = 1 << 20

# Frees large tensors between which small ones remain. Prints how many bytes of them are resident
# before and after the check that follows a step.
FREE_BETWEEN_KEPT = """
import torch
from megatron_chatflow.runtime.launch import make_malloc_keep_freed_memory
from megatron_chatflow.training.callbacks.process import FreedMemory, resident_bytes
make_malloc_keep_freed_memory()
watch = FreedMemory()
torch.ones(1000)
before = resident_bytes()
watch.after_iteration(1)
large, small = [], []
for _ in range(64):
    large.append(torch.ones(2 << 20))
    small.append(torch.ones(20_000))
del large
held = resident_bytes()
watch.after_iteration(2)
print(held - before, resident_bytes() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_freed_blocks_between_kept_ones_go_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FREE_BETWEEN_KEPT], check=True, capture_output=True, text=True
    )
    held, left = (int(number) for number in done.stdout.split())
    assert held > 500 * MIB
    assert left < 64 * MIB


def test_importing_the_entry_point_leaves_the_cpu_module_out() -> None:
    code = (
        "import sys, megatron_chatflow.pretrain, megatron_chatflow.training.build\n"
        "sys.exit('megatron_chatflow.runtime.cpu' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

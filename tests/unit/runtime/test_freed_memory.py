"""Tests that freed memory is kept between steps and returned once enough has accumulated."""

import ctypes
import subprocess
import sys

import pytest

from megatron_chatflow.train.callbacks.freed_memory import FreedMemory

MIB = 1 << 20

# Frees large tensors between which small ones remain. Prints how many bytes of them are resident
# before and after the check that follows a step.
FREE_BETWEEN_KEPT = """
import torch
from megatron_chatflow.runtime.launch import make_malloc_keep_freed_memory
from megatron_chatflow.train.callbacks.freed_memory import FreedMemory, resident_bytes
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


def _measured(*held: int | None) -> int:
    """Returns how often memory was returned for these amounts measured after steps."""
    given_back = []
    amounts = iter(held)
    watch = FreedMemory(measure=lambda: next(amounts), give_back=lambda: given_back.append(1))
    for _ in held:
        watch.after_iteration(1)
    return len(given_back)


def test_it_gives_back_what_grew_and_begins_anew() -> None:
    assert _measured(1000 * MIB, 1100 * MIB, 1450 * MIB) == 0
    assert _measured(1000 * MIB, 1457 * MIB) == 1
    # The memory that a step needs may have grown for good, for example by a checkpoint's staging
    # buffer.
    assert _measured(1000 * MIB, 3000 * MIB, 2900 * MIB, 3000 * MIB, 3000 * MIB) == 1
    assert _measured(1000 * MIB, 3000 * MIB, 1000 * MIB, 3000 * MIB) == 2
    assert _measured(None, None) == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_freed_blocks_between_kept_ones_go_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FREE_BETWEEN_KEPT], check=True, capture_output=True, text=True
    )
    held, left = (int(number) for number in done.stdout.split())
    assert held > 500 * MIB
    assert left < 64 * MIB

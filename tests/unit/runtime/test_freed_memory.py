"""Freed memory is kept from step to step, and goes back once it has piled up."""

import ctypes
import subprocess
import sys

import pytest

from megatron_chatflow.runtime.freed_memory import FreedMemory

MIB = 1 << 20

# Large tensors of ever other sizes, and between any two of them something that stays.
PILE_UP = """
import ctypes, random, torch
from megatron_chatflow.runtime.freed_memory import (
    FreedMemory, keep_freed_memory, resident_bytes)
keep_freed_memory()
watch, rng, kept, highest = FreedMemory(), random.Random(0), [], 0
for step in range(60):
    large = []
    for _ in range(40):
        large.append(torch.ones(rng.randrange(1, 30) << 17))
    large = [tensor for tensor in large if rng.random() < 0.5]
    kept += [torch.ones(20_000) for _ in range(40)]
    del large
    if {is_watched}:
        watch.after_step()
    highest = max(highest, resident_bytes())
print(highest)
"""


def _measured(*held: int | None) -> int:
    """How often memory went back when these amounts were seen after steps."""
    given_back = []
    amounts = iter(held)
    watch = FreedMemory(measure=lambda: next(amounts), give_back=lambda: given_back.append(1))
    for _ in held:
        watch.after_step()
    return len(given_back)


def test_it_gives_back_what_grew_and_begins_anew() -> None:
    assert _measured(1000 * MIB, 1100 * MIB, 1450 * MIB) == 0
    assert _measured(1000 * MIB, 1457 * MIB) == 1
    # What a step needs may have grown for good, by a checkpoint's staging buffer for one.
    assert _measured(1000 * MIB, 3000 * MIB, 2900 * MIB, 3000 * MIB, 3000 * MIB) == 1
    assert _measured(1000 * MIB, 3000 * MIB, 1000 * MIB, 3000 * MIB) == 2
    assert _measured(None, None) == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_a_process_stays_smaller_than_without() -> None:
    def highest(*, is_watched: bool) -> int:
        code = PILE_UP.replace("{is_watched}", str(is_watched))
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        return int(done.stdout)

    assert highest(is_watched=True) < 0.8 * highest(is_watched=False)

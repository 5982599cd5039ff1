"""Tests the measured rates of a device and durations of calls, on the CPU."""

import torch

from megatron_chatflow.runtime.device import (
    call_seconds,
    has_fast_bf16,
    peak_flops,
)

CPU = torch.device("cpu")


def test_as_many_calls_are_measured_as_were_asked_for() -> None:
    calls: list[int] = []
    seconds = call_seconds(lambda: calls.append(1), CPU, 5)
    assert len(seconds) == 5 and min(seconds) > 0
    assert len(calls) == 8


def test_slow_bf16_is_recognized() -> None:
    """Products in bf16 reach at least a third of the rate in fp32, or they are known as slow."""
    bf16, fp32 = (peak_flops(CPU, dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    assert bf16 is not None and fp32 is not None
    assert has_fast_bf16(CPU) == (bf16 > fp32 / 3)

"""Tests copies to a GPU on a CPU, with the rule that torch's page-locked copies follow."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_chatflow.runtime.device import to_device

CUDA = torch.device("cuda", 0)
BASE = torch.arange(24).reshape(4, 6)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Returns the page-locked tensors.

    Like `Tensor.pin_memory`, the substitute allocates the same strides and copies into them.
    """
    tensors: list[torch.Tensor] = []
    move = torch.Tensor.to

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        tensors.append(copy.copy_(tensor))
        return copy

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args[0] == CUDA:
            assert any(tensor is one for one in tensors) and options == {"non_blocking": True}
            return tensor
        return move(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return tensors


@pytest.mark.parametrize(
    "make",
    [
        # The source index of every token in a micro-batch of one sample, as `ForwardStep` creates
        # it.
        lambda: torch.zeros(1, dtype=torch.int64).reshape(1, -1).expand(1, 8).flatten(),
        lambda: BASE[:, :1].expand(4, 6),
        lambda: BASE.flatten().as_strided((4, 6), (1, 1)),
        lambda: BASE.flatten().unfold(0, 8, 2),
        lambda: BASE.t(),
        lambda: BASE[:, ::2],
        lambda: BASE[1:3],
        lambda: BASE[:0],
        lambda: torch.tensor(3.0),
    ],
)
def test_a_tensor_of_any_strides_is_copied(
    pinned: list[torch.Tensor], make: Callable[[], torch.Tensor]
) -> None:
    tensor = make()
    copy = to_device(tensor, CUDA)
    assert torch.equal(copy, tensor) and copy.is_contiguous() and len(pinned) == 1


def test_a_tensor_on_its_device_stays(pinned: list[torch.Tensor]) -> None:
    tensor = BASE.t()
    assert to_device(tensor, torch.device("cpu")) is tensor and not pinned

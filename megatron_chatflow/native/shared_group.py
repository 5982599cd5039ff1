"""Collectives of processes on one machine through shared memory: `csrc/kernels/cpu/shared_group`.

In: a memory file that every process of a group has open, and contiguous bf16 or fp32 tensors on the
CPU. Out: the same results in every process, to the bit; sums are taken in fp32 in the order of
ranks and rounded once. The reference is `torch.distributed`, whose functions these stand in for.
"""

from typing import Any

import torch

from megatron_chatflow.native.cpu_kernels import extension

MAX_SIZE: int = getattr(extension, "MAX_GROUP_SIZE", 0)
"""Most processes of a group; 0 where the extension is not built, or before it had groups."""

_ELEMENTS: dict[torch.dtype, Any] = (
    {torch.bfloat16: extension.Element.BF16, torch.float32: extension.Element.FP32}
    if extension is not None and MAX_SIZE
    else {}
)


def num_bytes(size: int, lanes: int) -> int:
    """Bytes of the memory file of ``size`` processes with ``lanes`` threads each."""
    assert extension is not None
    return int(extension.SharedGroup.num_bytes(size, lanes))


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the collectives take such tensors; the same for the same kind on every rank."""
    return all(tensor.device.type == "cpu" and tensor.dtype in _ELEMENTS for tensor in tensors)


class SharedGroup:
    """One process's end of a group.

    Every process calls the same collectives in the same order. They raise RuntimeError when another
    process has ended, does not come in time, or comes with another collective.
    """

    def __init__(
        self, file: int, rank: int, size: int, lanes: int, *, timeout_seconds: float
    ) -> None:
        """Joins; all processes have to have joined before the first collective.

        Args:
            file: Descriptor of a file of `num_bytes`, zeros at first; its bytes before 4096 are
                free. Closed with this object; nothing else in this process may open the file.
            rank: Of this process in the group.
            size: Processes of the group.
            lanes: Threads of each process; the same in all.
            timeout_seconds: How long a process that lives is waited for.

        Raises:
            RuntimeError: The file cannot be mapped or locked.
        """
        assert extension is not None
        self._group = extension.SharedGroup(file, rank, size, lanes, timeout_seconds)
        self._size = size

    def all_reduce(self, tensor: torch.Tensor, *, is_max: bool = False) -> None:
        """Overwrites ``tensor`` by the sum, or the highest values, over the group."""
        dense = tensor.contiguous()
        self._group.all_reduce(dense.data_ptr(), dense.numel(), *self._kind(dense, is_max))
        if dense is not tensor:
            tensor.copy_(dense)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Overwrites ``output`` by the tensors of all ranks, one after another."""
        self._check(output, tensor, whole=output)
        dense = tensor.contiguous()
        self._group.all_gather(
            dense.data_ptr(), output.data_ptr(), dense.numel() * dense.element_size()
        )

    def reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, *, is_max: bool = False
    ) -> None:
        """Overwrites ``output`` by this rank's part of the reduced tensors."""
        self._check(output, tensor, whole=tensor)
        dense = tensor.contiguous()
        self._group.reduce_scatter(
            dense.data_ptr(), output.data_ptr(), output.numel(), *self._kind(dense, is_max)
        )

    def _check(self, output: torch.Tensor, tensor: torch.Tensor, whole: torch.Tensor) -> None:
        part = tensor if whole is output else output
        if part.numel() * self._size != whole.numel() or part.dtype != whole.dtype:
            raise ValueError(
                f"shared memory: {tuple(part.shape)} of {part.dtype} is no {self._size}th part of "
                f"{tuple(whole.shape)} of {whole.dtype}"
            )
        if not output.is_contiguous():
            raise ValueError(f"shared memory: an output of strides {output.stride()} has gaps")

    def _kind(self, tensor: torch.Tensor, is_max: bool) -> tuple[Any, Any]:
        assert extension is not None
        reduction = extension.Reduction.MAX if is_max else extension.Reduction.SUM
        return _ELEMENTS[tensor.dtype], reduction

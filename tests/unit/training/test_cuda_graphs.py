"""Tests what CUDA graphs and NCCL's user buffers need from the environment."""

from typing import Any

import pytest
from megatron.core import nccl_allocator

from megatron_chatflow.errors import UserError
from megatron_chatflow.training.callbacks.cuda_graphs import CudaGraphs
from megatron_chatflow.training.optimizer import _start_nccl_allocator


def test_expandable_segments_are_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing: Any = None
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    with pytest.raises(UserError, match="NCCL_GRAPH_REGISTER=0"):
        CudaGraphs(nothing, nothing, nothing)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    with pytest.raises(AttributeError):  # it goes on to the configuration
        CudaGraphs(nothing, nothing, nothing)


def test_an_allocator_that_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise PermissionError(13, "Permission denied", "build")

    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(nccl_allocator, "init", init)
    with pytest.raises(UserError, match="use_nccl_ub: megatron-core cannot compile .* writable"):
        _start_nccl_allocator()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments: True")
    with pytest.raises(UserError, match="does not work with .* in PYTORCH_ALLOC_CONF; remove one"):
        _start_nccl_allocator()

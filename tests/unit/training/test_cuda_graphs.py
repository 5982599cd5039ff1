"""Tests what CUDA graphs need from the environment."""

from typing import Any

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.training.callbacks.cuda_graphs import CudaGraphs


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

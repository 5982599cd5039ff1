"""Tests that ``--deterministic-mode`` refuses settings that contradict it."""

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import use_deterministic_algorithms


@pytest.mark.parametrize(
    ("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS")]
)
def test_a_variable_that_says_otherwise_is_an_error(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name}.*not deterministic"):
        use_deterministic_algorithms({name: value})


def test_it_comes_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(UserError, match="already initialized"):
        use_deterministic_algorithms({})

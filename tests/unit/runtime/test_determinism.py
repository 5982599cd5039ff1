"""Tests the settings made by ``--deterministic-mode``, in a separate process."""

import subprocess
import sys

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import use_deterministic_algorithms

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

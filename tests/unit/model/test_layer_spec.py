"""Tests which implementation of the layers a run uses."""

from typing import Any

import pytest
import torch

from megatron_chatflow.config import TrainConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels.attention import Facts
from megatron_chatflow.model.layer_spec import choose_layers


def chosen(
    impl: str,
    *,
    capability: Any = (9, 0),
    installed: Any = "2.9",
    backend: Any = "auto",
    **facts: Any,
) -> tuple[str, str]:
    values = {"dtype": torch.bfloat16, "head_dim": 128, "import_error": lambda name: None, **facts}
    here = Facts(
        capability=capability,
        deterministic=False,
        installed={"transformer_engine": installed} if installed else {},
        has_cudnn=False,
        **values,
    )
    train: Any = TrainConfig(
        train_iters=1,
        micro_batch_size=1,
        global_batch_size=1,
        transformer_impl=impl,
        attention_backend=backend,
    )
    return choose_layers(train, here)


@pytest.mark.parametrize("backend", ["auto", "transformer_engine"])
def test_transformer_engine_is_used_where_it_works(backend: str) -> None:
    assert chosen("auto", backend=backend) == (
        "transformer_engine",
        "transformer-engine 2.9, through megatron-core",
    )


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"installed": None}, "transformer-engine is not installed"),
        ({"installed": "1.13"}, "transformer-engine 1.13 is older than 2.0"),
        ({"capability": None}, "there is no GPU"),
        ({"capability": (7, 0)}, "it has no kernel for sm_70"),
        ({"dtype": torch.float32}, "it has no torch.float32 kernel"),
        ({"head_dim": 512}, "it has no kernel for heads of 512"),
        ({"import_error": lambda name: "OSError: libcudnn"}, "OSError: libcudnn"),
        ({"backend": "flash_attn_2"}, "--attention-backend flash_attn_2 needs them"),
    ],
)
def test_local_layers_are_used_elsewhere_and_the_log_says_why(facts: Any, reason: str) -> None:
    name, description = chosen("auto", **facts)
    assert name == "local" and reason in description


def test_a_request_is_followed_wherever_the_library_can_be_imported() -> None:
    assert chosen("local")[0] == "local"
    assert chosen("transformer_engine", capability=None, dtype=torch.float32)[0] == (
        "transformer_engine"
    )


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"installed": None}, "train.transformer_impl: .* is not installed; install it, or"),
        ({"import_error": lambda name: "OSError: x"}, r"cannot be imported \(OSError: x\)"),
        ({"backend": "cudnn"}, "train.attention_backend: cudnn cannot be used in transformer-eng"),
    ],
)
def test_a_request_that_cannot_be_followed_is_refused(facts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen("transformer_engine", **facts)

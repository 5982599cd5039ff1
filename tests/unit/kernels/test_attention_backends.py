"""Tests which attention kernels are chosen, and the reasons reported for rejecting faster ones."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels.attention import (
    BACKENDS,
    KERNELS,
    Facts,
    choose,
    gather_facts,
    import_error,
    preference,
)
from megatron_chatflow.model import attention

EVERYTHING = {
    "flash_attn_4": "4.0.0b36",
    "flash_attn_3": "3.0.0",
    "flash_attn_2": "2.8.3.post1",
}
HOPPER = Facts((9, 0), torch.bfloat16, 128, False, EVERYTHING, True, lambda name: None)


def without(facts: Facts, *names: str) -> Facts:
    left = {name: v for name, v in facts.installed.items() if name not in names}
    return replace(facts, installed=left)


def test_the_best_that_is_there_is_taken() -> None:
    facts = HOPPER
    for name in ("flash_attn_3", "flash_attn_4", "flash_attn_2"):
        assert choose(facts)[0] == name
        facts = without(facts, name)
    assert choose(facts)[0] == "cudnn"
    assert choose(replace(facts, has_cudnn=False))[0] == "flash"
    assert choose(replace(facts, capability=None))[0] == "sdpa"


def test_a_window_is_not_reported_as_torchs_flash_kernel() -> None:
    windowed = replace(without(HOPPER, *EVERYTHING), window=4096)
    for facts, name in ((windowed, "cudnn"), (replace(windowed, has_cudnn=False), "flash")):
        for wanted in ("auto", name):
            chosen, title = choose(facts, wanted)
            assert chosen == name and title.startswith(
                "torch's scaled_dot_product_attention with a mask for the window"
            )
    assert choose(replace(HOPPER, window=4096))[0] == "flash_attn_3"


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"capability": (10, 0)}, "flash_attn_4"),
        ({"capability": (8, 0)}, "flash_attn_2"),
        ({"capability": (7, 5)}, "sdpa"),
        ({"dtype": torch.float32}, "sdpa"),
        ({"head_dim": 256}, "flash_attn_3"),
        ({"head_dim": 320}, "sdpa"),
        ({"head_dim": 20}, "sdpa"),
        ({"capability": (12, 0)}, "flash_attn_4"),
        ({"capability": (12, 0), "deterministic": True}, "flash_attn_2"),
        ({"capability": (10, 0), "deterministic": True}, "flash_attn_4"),
        ({"installed": {"flash_attn_4": "4.0.0b4"}}, "cudnn"),
        ({"installed": {"flash_attn_4": "4.0.0b5"}}, "flash_attn_4"),
        ({"installed": {"flash_attn_4": "4.0.0"}}, "flash_attn_4"),
        ({"installed": {"flash_attn_2": "2.10.0"}}, "flash_attn_2"),
        ({"deterministic": True, "installed": {}}, "flash"),
        ({"installed": {"flash_attn_2": "2.5.8"}}, "cudnn"),
    ],
)
def test_kernels_that_do_not_fit_are_passed_over(changes: dict[str, object], chosen: str) -> None:
    facts = replace(HOPPER, **changes)
    assert choose(facts)[0] == chosen


def test_the_reason_names_what_was_passed_over_and_the_version() -> None:
    _, reason = choose(without(HOPPER, "flash_attn_3"))
    assert "(flash-attn-4 4.0.0b36)" in reason
    assert "flash-attn-3 is not installed" in reason
    _, reason = choose(replace(HOPPER, capability=(8, 0), installed={"flash_attn_2": "2.5.8"}))
    assert "flash-attn 2.5.8 is older than 2.6" in reason


def test_a_library_that_is_broken_is_passed_over_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("import a_part_that_is_not_there\n")
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("assert False, 'built for\\nanother'\n")
    (tmp_path / "flash_attn" / "cute.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    facts = replace(HOPPER, import_error=import_error)
    name, reason = choose(facts)
    assert name == "cudnn"
    missing = "ModuleNotFoundError: No module named 'a_part_that_is_not_there'"
    assert f"flash-attn-3 cannot be imported ({missing})" in reason
    assert "flash-attn-4 cannot be imported (AssertionError: built for another)" in reason
    with pytest.raises(UserError, match="flash_attn_2 cannot be used: .* cannot be imported"):
        choose(facts, "flash_attn_2")


def test_nothing_is_imported_that_another_reason_speaks_against() -> None:
    asked: list[str] = []
    facts = replace(HOPPER, capability=(8, 0), import_error=lambda name: asked.append(name))
    assert choose(facts)[0] == "flash_attn_2"
    assert asked == ["flash_attn_2"]


def test_torch_takes_its_kernels_in_the_order_that_the_log_says() -> None:
    with attention.torch_kernels("cudnn"):
        order = torch._C._get_sdp_priority_order()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert order[:4] == [int(kernel) for kernel in attention.TORCH_KERNELS["cudnn"]]
    with attention.torch_kernels("flash"):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch._C._get_sdp_priority_order()[0] == int(attention.SDPBackend.FLASH_ATTENTION)


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert choose(HOPPER, "flash")[0] == "flash"
    assert choose(replace(HOPPER, capability=None), "sdpa")[0] == "sdpa"
    with pytest.raises(UserError, match="flash_attn_3 cannot be used: it has no kernel for sm_80"):
        choose(replace(HOPPER, capability=(8, 0)), "flash_attn_3")
    with pytest.raises(UserError, match="train.attention_backend: cudnn .* not deterministic"):
        choose(replace(HOPPER, deterministic=True), "cudnn")


def test_without_a_gpu_there_is_torch_s() -> None:
    facts = gather_facts(torch.device("cpu"), torch.bfloat16, 64, deterministic=False)
    assert facts.capability is None and not facts.has_cudnn
    assert choose(facts)[0] == "sdpa"


def test_every_back_end_has_a_place_and_a_flag() -> None:
    from typing import get_args, get_type_hints

    from megatron_chatflow.config import TrainConfig

    flags = get_args(get_type_hints(TrainConfig)["attention_backend"])
    assert flags == ("auto", "transformer_engine", *BACKENDS)
    assert sorted(preference((9, 0))) == sorted(preference(None)) == sorted(BACKENDS)
    assert set(KERNELS) <= set(BACKENDS)

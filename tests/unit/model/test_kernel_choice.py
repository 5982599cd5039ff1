"""Tests that the fastest correct implementation is chosen if some are missing or broken."""

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_chatflow.config import TrainConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels.attention import gather_facts
from megatron_chatflow.model import kernel_choice as kernels
from megatron_chatflow.model.kernel_choice import (
    Choice,
    Operation,
    StepSizes,
    attention_operation,
    choose_fastest,
    document_ends,
    median_seconds,
    step_operations,
)

CPU = torch.device("cpu")
FUSED = ("norm", "RoPE", "SwiGLU", "loss passes")
NAMES = ("ours", "library", "torch", "far")


def sizes(dtype: torch.dtype, **changes: Any) -> StepSizes:
    fields: dict[str, Any] = {
        "num_tokens": 256,
        "norm_tokens": 128,
        "hidden_size": 64,
        "ffn_width": 96,
        "num_heads": 4,
        "num_groups": 2,
        "head_dim": 16,
        "vocab_rows": 128,
        "dtype": dtype,
        "device": CPU,
    }
    return StepSizes(**{**fields, **changes})


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def operation(**implementations: Callable[..., Any]) -> Operation:
    def inputs() -> tuple[torch.Tensor, ...]:
        return (torch.linspace(-1, 1, 50).requires_grad_(),)

    absent = {name: "is not installed" for name in NAMES if name not in implementations}
    return Operation("double", NAMES, implementations, inputs, absent=absent)


def choice(seconds: dict[str, float], **implementations: Callable[..., Any]) -> Choice:
    """Returns the choice made when the clock shows these seconds."""
    given = operation(**implementations)
    times = {given.implementations[name]: s for name, s in seconds.items()}
    return choose_fastest([given], CPU, lambda _, function, __: times[function])[0]


def another(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: function(x)


def test_the_fastest_is_taken_and_every_figure_is_said() -> None:
    found = choice(
        {"ours": 0.03, "library": 0.001, "torch": 0.02},
        ours=another(doubled),
        library=another(doubled),
        torch=doubled,
    )
    assert found.name == "library"
    assert found.description == (
        "library; forward and backward here: library 1,000 us, torch 20,000 us, ours 30,000 us; "
        "far: is not installed"
    )


@pytest.mark.parametrize(("seconds", "name"), [(1.02, "ours"), (1.04, "torch")])
def test_of_two_about_as_fast_the_same_is_taken_at_every_start(seconds: float, name: str) -> None:
    found = choice({"ours": seconds, "torch": 1.0}, ours=another(doubled), torch=doubled)
    assert found.name == name


def no_gpu(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image for this GPU\nand a page of C++")


def wrong_shape(x: torch.Tensor) -> torch.Tensor:
    return 2 * x[:-1]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2.01 * gradient


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda x: 2.01 * x, "from fp32's result"),
        (WrongGradient.apply, "from fp32's result"),
        (lambda x: x * float("nan"), "nan from fp32's result"),
        (wrong_shape, r"a result of \(49,\), not \(50,\)"),
        (lambda x: (2 * x, x), "3 results, where there are 2"),
        (no_gpu, "left out: no kernel image for this GPU;"),
    ],
)
def test_what_is_wrong_or_fails_is_left_out(broken: Callable[..., Any], why: str) -> None:
    found = choice({"ours": 0.001, "torch": 0.02}, ours=broken, torch=doubled)
    assert found.name == "torch"
    assert re.search(f"; ours: left out: .*{why}|; ours: {why}", found.description)


def test_a_reference_that_fails_leaves_nothing_to_compare_with() -> None:
    with pytest.raises(RuntimeError, match="double: no implementation works: .*no kernel image"):
        choice({}, ours=doubled, torch=no_gpu)


def test_a_reference_that_is_slow_or_fails_at_full_size_costs_itself_alone() -> None:
    def too_large(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 50:
            raise torch.OutOfMemoryError("tried to allocate 34 GiB")
        return 2 * x

    small = operation(ours=doubled, torch=too_large)
    large = replace(small, make_inputs=lambda: (torch.ones(60, requires_grad=True),), smaller=small)
    (found,) = choose_fastest([large], CPU)
    assert found.name == "ours"
    assert "torch: left out: tried to allocate 34 GiB" in found.description


def test_a_time_is_of_forward_and_backward() -> None:
    calls: list[str] = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            calls.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            calls.append("backward")
            return 2 * gradient

    assert median_seconds(operation(), Counted.apply, CPU, 2) > 0
    # One call determines the output's shape, three are warm-up, two are measured.
    assert calls == ["forward", *["forward", "backward"] * 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_s_operations_agree_with_fp32(dtype: torch.dtype) -> None:
    """On a CPU our implementations are the references. They take part and agree to rounding."""
    facts = gather_facts(CPU, dtype, 16, deterministic=False)
    attention = attention_operation(sizes(dtype), facts, 128, "torch")
    operations = [*step_operations(sizes(dtype)), attention]
    for found, given in zip(choose_fastest(operations, CPU), operations, strict=True):
        usable = {"sdpa"} if given is attention else {"torch", "ours"}
        assert set(given.implementations) == usable
        assert found.name in usable
        assert "left out" not in found.description, found.description


def test_a_softmax_of_zeros_is_not_right() -> None:
    """Probabilities of pieces other than the label are small and are compared separately."""
    (given,) = (o for o in step_operations(sizes(torch.bfloat16)) if o.name == "loss passes")

    def zeros(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        losses, differences, scale, labels = given.implementations["torch"](logits, labels)
        place = (labels - 8).clamp(0, 127).unsqueeze(-1)
        alone = torch.zeros_like(differences).scatter(-1, place, differences.gather(-1, place))
        return losses, alone, scale, labels

    assert given.smaller is not None
    broken = {"ours": zeros, "torch": given.implementations["torch"]}
    small = replace(given.smaller, implementations=broken)
    (found,) = choose_fastest([replace(given, smaller=small)], CPU)
    assert "ours: left out: it is 1 from fp32's result" in found.description


def test_fp32_results_are_of_few_tokens() -> None:
    large = sizes(torch.bfloat16, num_tokens=40_000, norm_tokens=20_000)
    facts = gather_facts(CPU, torch.bfloat16, 16, deterministic=False)
    for given in (*step_operations(large), attention_operation(large, facts, 32768, "torch")):
        assert given.smaller is not None and given.smaller.smaller is None
        assert len(given.smaller.make_inputs()[0]) == 1024
        assert len(given.make_inputs()[0]) == (2048 if given.name == "loss passes" else 16384)
        assert set(given.smaller.implementations) == set(given.implementations)


def test_documents_are_of_unequal_length_in_every_second_sequence() -> None:
    assert document_ends(512, 256) == [0, 128, 192, 256, 512]
    assert document_ends(100, 100) == [0, 100]
    ends = document_ends(16384, 4096)
    assert ends[-1] == 16384 and {4096, 8192, 12288} <= set(ends)
    assert all(b > a for a, b in zip(ends, ends[1:], strict=False))


def test_what_sizes_rule_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = sizes(torch.bfloat16, hidden_size=63, ffn_width=97, head_dim=12, vocab_rows=129)
    for given in step_operations(odd):
        assert given.absent["ours"] == "csrc/kernels has none for these sizes in torch.bfloat16"
    gpu = torch.device("cuda")
    monkeypatch.setattr(kernels, "can_import", lambda module: True)
    monkeypatch.setattr(kernels, "load_kernels", lambda: (object(), "csrc/kernels"))

    def missing(name: str, **changes: Any) -> str | None:
        given = sizes(torch.bfloat16, device=gpu, **changes)
        return kernels._missing(given, "SwiGLU", name)

    assert missing("liger") is None
    assert missing("liger", num_tokens=2**24) == "its kernels reckon places in 32 bits"
    assert missing("megatron") == "not compiled, where csrc/kernels has a kernel"
    assert missing("megatron", ffn_width=97) is None


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_built: bool = True,
    context: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **train: Any,
) -> kernels.Kernels:
    """Returns the choice of a run with a GPU, whose measurements all favour liger-kernel."""

    def measured(operations: list[Any], device: torch.device) -> list[Choice]:
        return [Choice("liger", "measured") for _ in operations]

    library = (object(), "csrc/kernels") if is_built else (None, "csrc/kernels is not built")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(kernels, "load_kernels", lambda: library)
    for name, function in {
        "choose_fastest": measured,
        "step_operations": lambda sizes: [SimpleNamespace(name=given) for given in FUSED],
        "attention_operation": lambda *_: None,
        "gather_facts": lambda *_, **__: None,
        "choose": lambda *_: ("flash", "torch's flash attention"),
        "describe_backend": lambda reason, *_: reason,
    }.items():
        monkeypatch.setattr(kernels, name, function)
    given = sizes(dtype, device=torch.device("cuda"))
    config = TrainConfig(micro_batch_size=1, global_batch_size=1, **train)
    return kernels.choose_kernels(given, config, sequence_length=256, context_parallel_size=context)


def test_a_run_on_a_gpu_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch)
    assert (found.norm, found.rope, found.swiglu, found.loss) == ("liger",) * 4
    assert found.attention == "liger"
    assert found.descriptions["rotary embedding"] == "measured"


@pytest.mark.parametrize(
    "run",
    [{"attention_backend": "flash"}, {"context": 2}, {"dtype": torch.float32}],
    ids=["asked", "context", "fp32"],
)
def test_attention_is_not_always_measured(
    monkeypatch: pytest.MonkeyPatch, run: dict[str, Any]
) -> None:
    found = chosen(monkeypatch, **run)
    assert (found.attention, found.norm) == ("flash", "liger")


@pytest.mark.parametrize(
    ("train", "is_built", "name", "says"),
    [
        ({"deterministic_mode": True}, True, "ours", "ours, csrc/kernels: --deterministic-mode"),
        ({"deterministic_mode": True}, False, "torch", "torch's rms_norm: csrc/kernels is not"),
        ({"fused_kernels": "ours"}, True, "ours", "ours, csrc/kernels: --fused-kernels ours"),
        ({"fused_kernels": "torch"}, True, "torch", "torch's rms_norm: --fused-kernels torch"),
    ],
)
def test_a_run_that_asks_for_some_measures_none(
    monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], is_built: bool, name: str, says: str
) -> None:
    found = chosen(monkeypatch, is_built=is_built, **train)
    assert (found.norm, found.rope, found.swiglu, found.loss) == (name,) * 4
    assert found.attention == ("flash" if "deterministic_mode" in train else "liger")
    assert found.descriptions["norm"].startswith(says)


def test_kernels_that_are_asked_for_have_to_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train.fused_kernels: ours cannot be used: .* not built"):
        chosen(monkeypatch, is_built=False, fused_kernels="ours")

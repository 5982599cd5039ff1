"""Tests the training benchmark: the classification of operations, and peers in processes."""

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import SHAPES
from benchmarks.step_profile import (
    OUTSIDE,
    copy_rate,
    least_bytes,
    part_of,
    product_rate,
    time_and_flops,
)


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::mm", "matrix products"),
        ("aten::bmm", "attention"),
        ("_ComposedAttentionBackward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_FusedSwiGLUBackward", "SwiGLU"),
        ("_FusedRMSNorm", "norm"),
        ("FusedAttnFunc", "attention"),
        ("FlashAttnVarlenFuncBackward", "attention"),
        ("flash_attn::_flash_attn_varlen_forward", "attention"),
        ("aten::_scaled_dot_product_cudnn_attention_backward", "attention"),
        ("aten::_softmax", "attention"),
        ("megatron_chatflow::rope", "RoPE"),
        ("_RotateBackward", "RoPE"),
        ("megatron_chatflow::swiglu_backward", "SwiGLU"),
        ("megatron_chatflow::rms_norm", "norm"),
        ("aten::_fused_rms_norm_backward", "norm"),
        ("_LinearCrossEntropy", "loss"),
        ("megatron_chatflow::softmax_statistics", "loss"),
        ("megatron_chatflow::softmax_gradient_", "loss"),
        ("aten::norm", "optimizer"),
        ("aten::_foreach_norm", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("_ReduceFromModelParallelRegion", "collectives"),
        ("aten::copy_", "copies and casts"),
        ("aten::add_", "sums and scaling"),
        ("aten::empty", "other"),
    ],
)
def test_the_part_of_an_operation(operation: str, part: str) -> None:
    assert part_of(operation) == part


def test_a_kernel_counts_once_and_with_its_operator() -> None:
    def event(name: str, number: int, begin: int, end: int, kind: DeviceType) -> FunctionEvent:
        made = FunctionEvent(
            number, name, 0, begin, end, use_device="cuda", device_type=kind, stack=[]
        )
        made.flops = 1000 if name == "aten::mm" else 0
        return made

    product = event("aten::mm", 1, 0, 10, DeviceType.CPU)
    function = event("_LinearCrossEntropy", 2, 0, 40, DeviceType.CPU)
    inner = event("megatron_chatflow::softmax_statistics", 3, 20, 30, DeviceType.CPU)
    product.append_kernel("sm90_xmma_gemm_bf16", 0, 70)
    inner.append_kernel("softmax_statistics_kernel", 0, 20)
    kernels = [
        event("sm90_xmma_gemm_bf16", 4, 100, 170, DeviceType.CUDA),
        event("softmax_statistics_kernel", 5, 170, 190, DeviceType.CUDA),
        event("a_library_s_own", 6, 190, 195, DeviceType.CUDA),
    ]
    trace = EventList([product, function, inner, *kernels], use_device="cuda", with_flops=True)
    trace._build_tree()
    parts = time_and_flops(trace.key_averages(), is_cuda=True)
    assert {part: figures for part, figures in parts.items() if figures[0]} == {
        "matrix products": (70, 1000),
        "loss": (20, 0),
        OUTSIDE: (5, 0),
    }


def test_a_profile_of_this_machine_has_parts_and_flops() -> None:
    left = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as trace:
        (left @ left).softmax(-1)
    parts = time_and_flops(trace.key_averages(), is_cuda=False)
    assert parts["matrix products"][0] > 0 and parts["matrix products"][1] == 2 * 64**3
    assert parts["attention"][0] > 0 and OUTSIDE not in parts


def test_bytes_that_a_part_cannot_do_without() -> None:
    shape = SHAPES["58m"]
    moved = least_bytes(shape)
    assert moved["loss"] == 4 * 4096 * 32000
    assert moved["SwiGLU"] == 8 * 16 * 4096 * 1376
    assert least_bytes(shape, 2)["loss"] == moved["loss"] // 2
    assert least_bytes(shape, 2)["norm"] == moved["norm"]


def test_rates_are_rates() -> None:
    cpu = torch.device("cpu")
    assert product_rate(cpu, torch.float32, size=64) > 1e6
    assert copy_rate(cpu) > 1e6

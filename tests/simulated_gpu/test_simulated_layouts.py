"""Tests that every kind of layout runs on a simulated GPU and waits only where that is known.

The models have the widths of LLaMA-2 and few layers.
"""

from collections import Counter

import pytest
import torch
from simulator import Simulator, example

# Where the host waits for the GPU in a step: file, function and reason.
KNOWN = {
    ("megatron/core/distributed/finalize_model_grads.py", "finalize_model_grads"): (
        "megatron-core before 0.18 asks whether the batch has loss tokens"
    ),
    (
        "megatron_chatflow/training/loop.py",
        "train_step",
    ): "sums of the loss, for guard and log",
    ("megatron/core/optimizer/clip_grads.py", "get_grad_norm_fp32"): (
        "the norm of the gradient, for the guard and for clipping"
    ),
    ("megatron_chatflow/training/report.py", "batch_digests"): "digests of the batch, for the log",
    ("megatron_chatflow/training/report.py", "<genexpr>"): "digests of the batch, for the log",
    ("megatron_chatflow/runtime/signals.py", "is_set"): "whether any rank was asked to stop",
}
KNOWN_OF_STRAGGLERS = {
    ("megatron_chatflow/training/callbacks/straggler.py", "read_and_reset"): "the ranks' times",
    ("megatron_chatflow/training/callbacks/straggler.py", "report"): "the ranks' times",
}

TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = f"{TENSOR} --pipeline-model-parallel-size 2 --num-layers 4"
CHUNKS = "--num-layers 8 --num-layers-per-virtual-pipeline-stage 1"
CASES = {
    "7b": ("7b.yaml", "--num-layers 2", 8, 0),
    "7b, two samples": ("7b.yaml", "--num-layers 2 --micro-batch-size 2", 8, 7),
    "13b": ("13b.yaml", "--num-layers 2", 16, 5),
    "13b, two samples": ("13b.yaml", "--num-layers 2 --micro-batch-size 2", 16, 0),
    "paper": ("paper.yaml", "--num-layers 2", 8, 1),
    "paper, one sample": ("paper.yaml", "--num-layers 2 --micro-batch-size 1", 8, 0),
    "70b, first stage": ("70b.yaml", CHUNKS, 32, 0),
    "70b, last stage": ("70b.yaml", f"{CHUNKS} --micro-batch-size 2", 256, 255),
    "interleaved, first stage": (
        "7b.yaml",
        f"{PIPELINE} --num-virtual-stages-per-pipeline-rank 2",
        8,
        0,
    ),
    "interleaved, last stage": (
        "7b.yaml",
        f"{PIPELINE} --num-virtual-stages-per-pipeline-rank 2",
        8,
        7,
    ),
    "context parallel": ("7b.yaml", f"{TENSOR} --num-layers 2 --context-parallel-size 2", 8, 2),
    "selective": ("7b.yaml", f"{TENSOR} --num-layers 2 --recompute-granularity selective", 8, 0),
    "uniform": (
        "7b.yaml",
        f"{TENSOR} --num-layers 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
        8,
        0,
    ),
    "block": (
        "7b.yaml",
        f"{TENSOR} --num-layers 2 --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 1",
        8,
        0,
    ),
    "no overlap": (
        "7b.yaml",
        f"{TENSOR} --num-layers 2 --no-overlap-param-gather --no-overlap-grad-reduce",
        8,
        0,
    ),
    "replicated optimizer": (
        "7b.yaml",
        f"{TENSOR} --num-layers 2 --no-overlap-param-gather --no-use-distributed-optimizer",
        8,
        0,
    ),
    "deterministic": ("7b.yaml", f"{TENSOR} --num-layers 2 --deterministic-mode", 8, 0),
    "stragglers": ("7b.yaml", f"{TENSOR} --num-layers 2 --log-straggler", 8, 0),
    "fp32": ("7b.yaml", "--num-layers 2 --no-bf16", 8, 0),
    "NCCL user buffers": (
        "7b.yaml",
        f"{TENSOR} --num-layers 2 --use-nccl-ub --ddp-pad-buckets-for-high-nccl-busbw",
        8,
        0,
    ),
    "padded heads": ("7b.yaml", f"{TENSOR} --num-layers 2 --pad-attention-heads", 8, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layout_runs_and_the_host_waits_only_where_known(simulator: Simulator, name: str) -> None:
    base, flags, world_size, rank = CASES[name]
    found = simulator.observe(example(base, *flags.split()), world_size=world_size, rank=rank)
    assert found.num_steps == 2
    assert found.cpu_tensors == []
    known = KNOWN | (KNOWN_OF_STRAGGLERS if name == "stragglers" else {})
    for one in found.synchronizations:
        assert one.phase in ("gradients", "update", "after"), one
        file, _, rest = one.lines[0].partition(":")
        assert (file, rest.partition(" ")[2]) in known, one
    counts = Counter({one.phase: 0 for one in found.synchronizations})
    for one in found.synchronizations:
        counts[one.phase] += one.count
    # megatron-core asks once for every model chunk.
    assert counts["gradients"] <= (2 if "virtual" in flags else 1)
    assert counts["update"] == 2


@pytest.mark.skipif(
    not hasattr(torch.ops.aten.addmm, "dtype_out"),
    reason="torch before 2.8 cannot add a product in bf16 to an fp32 matrix",
)
def test_weight_gradients_need_no_kernel_and_no_tensor_of_their_own(simulator: Simulator) -> None:
    fused, separate = (
        simulator.observe(example("7b.yaml", "--num-layers", "2", *flags), world_size=8)
        for flags in ([], ["--no-gradient-accumulation-fusion"])
    )
    # A sum for each of a layer's four linear layers; the products stay.
    assert separate.layer_launches["backward"] - fused.layer_launches["backward"] == 4
    flops = [sum(found.flops["backward"].values()) for found in (fused, separate)]
    assert flops[0] == flops[1]
    assert fused.peak_bytes <= separate.peak_bytes

"""The training benchmark's parts: what an operation belongs to, and peers in their own process."""

import math
from contextlib import closing

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.train.benchmark_peer import PeerProcess
from megatron_chatflow.train.benchmark_profile import least_bytes, part_of
from megatron_chatflow.train.benchmark_shape import OURS, SHAPES, Shape


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::mm", "matrix products"),
        ("aten::bmm", "attention"),
        ("_ComposedAttentionBackward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_FusedSwiGLUBackward", "SwiGLU"),
        ("_FusedRMSNorm", "norm"),
        ("_LinearCrossEntropy", "loss"),
        ("aten::_fused_adamw_", "optimizer"),
        ("_ReduceFromModelParallelRegion", "collectives"),
        ("aten::copy_", "copies and casts"),
        ("aten::add_", "sums and scaling"),
        ("aten::empty", "other"),
    ],
)
def test_the_part_of_an_operation(operation: str, part: str) -> None:
    assert part_of(operation) == part


def test_bytes_that_a_part_cannot_do_without() -> None:
    shape = SHAPES["58m"]
    moved = least_bytes(shape)
    assert moved["loss"] == 4 * 4096 * 32000
    assert moved["SwiGLU"] == 8 * 16 * 4096 * 1376
    assert least_bytes(shape, 2)["loss"] == moved["loss"] // 2
    assert least_bytes(shape, 2)["norm"] == moved["norm"]


def test_a_peer_steps_in_its_own_process() -> None:
    pytest.importorskip("transformers")
    shape = Shape(1, 32, 64, 2, 2, 16, 1, vocab_size=128)
    peer = PeerProcess("transformers", shape, keep_freed_memory=False)
    try:
        losses = [peer.step() for _ in range(20)]
    finally:
        peer.close()
    assert math.isclose(losses[0], math.log(128), rel_tol=0.1)
    assert losses[-1] < losses[0]


def test_our_step_over_two_processes() -> None:
    shape = Shape(1, 32, 64, 2, 2, 16, 1, vocab_size=128)
    losses = []
    for num_processes, switches in ((1, {}), (2, {}), (2, {"sequence_parallel": True})):
        with closing(PeerProcess(OURS, shape, num_processes=num_processes, **switches)) as ours:
            losses.append([ours.step() for _ in range(20)])
    assert math.isclose(losses[0][0], math.log(128), rel_tol=0.1)
    assert losses[0][-1] < losses[0][0]
    for cut in losses[1:]:
        assert cut == pytest.approx(losses[0], rel=0.01)


def test_a_process_that_ends_is_an_error() -> None:
    shape = Shape(1, 32, 64, 2, 2, 16, 1, vocab_size=128)
    with closing(PeerProcess(OURS, shape, num_processes=2)) as ours:
        ours.step()
        ours._processes[1].kill()
        with pytest.raises(UserError, match=r"a subject's own process ended: \S"):
            ours.step()
        assert all(process.poll() is not None for process in ours._processes)
    with pytest.raises(UserError, match=r"KeyError: 'nothing'"):
        PeerProcess("nothing", shape)

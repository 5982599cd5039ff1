"""Tests training steps that benchmarks measure in processes of their own."""

import math
from contextlib import closing

import pytest

from benchmarks.peer_process import PeerProcess
from benchmarks.shapes import OURS, Shape
from megatron_chatflow.errors import UserError

pytestmark = pytest.mark.slow


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
        with pytest.raises(UserError, match=r"a benchmark process exited: \S"):
            ours.step()
        assert all(process.poll() is not None for process in ours._processes)
    with pytest.raises(UserError, match=r"KeyError: 'nothing'"):
        PeerProcess("nothing", shape)

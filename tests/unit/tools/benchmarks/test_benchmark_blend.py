"""Tests the blend benchmark on small runs."""

import argparse

import numpy as np
import pytest

from benchmarks.blend import (
    OURS,
    PEER,
    add_arguments,
    random_schedule,
    run,
    worst_error,
)
from megatron_chatflow.runtime import load_extension

extension = load_extension("blend")


def rows_of(*flags: str) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", action="store_true")
    add_arguments(parser)
    return [dict(row) for row in run(parser.parse_args(flags))]


def test_rows_of_ours() -> None:
    rows = rows_of("--num-samples", "40000", "--num-sources", "3", "--samples-per-iteration", "64")
    assert [row["ramp"] for row in rows] == ["constant", "linear", "cosine"]
    for row in rows:
        assert str(row["by"]).startswith(OURS) and row["basis"] == "measured"
        assert 0 < row["best_ns_per_sample"] <= row["ns_per_sample"]
        assert 0 < row["first_batch_ms"] and 0 < row["cold_ms"]
        assert 0.5 < row["worst_error"] < 1
        if extension is not None:
            assert 10_000 < row["held_bytes"] < 1_000_000


def test_the_peer_stands_beside_it() -> None:
    pytest.importorskip("megatron.core.datasets.helpers_cpp")
    rows = rows_of("--num-samples", "50000", "--num-sources", "40", "--peers")
    peer = [row for row in rows if row["by"] == PEER]
    assert len(peer) == 1
    assert peer[0]["held_bytes"] == 500_000
    assert str(peer[0]["basis"]).startswith("projected")
    assert peer[0]["worst_error"] > 0.5


def test_schedules_are_made_up_alike() -> None:
    one, other = (random_schedule(10**6, 8, "linear", 512) for _ in range(2))
    assert one.to_dict() == other.to_dict()
    assert len(one.knots) == 6
    np.testing.assert_array_equal(
        random_schedule(10**6, 8, "constant", 512).weights(0), one.weights(0)
    )
    assert worst_error(one, 1000) < 1

"""Tests monitoring: ranks compared by made-up figures, loggers that raise, profile settings."""

import logging
from types import SimpleNamespace

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.training.callbacks.isolated import IsolatedCallback
from megatron_chatflow.training.callbacks.profiler import ProfilerWindow
from megatron_chatflow.training.callbacks.straggler import compare


def test_the_slowest_of_each_stage_is_found() -> None:
    rows = [[1.0, 2.0, 0.1], [1.0, 2.2, 0.0], [3.0, 6.0, 0.0], [6.0, 12.0, 0.4]]
    places = [("a", 0), ("b", 0), ("c", 1), ("d", 1)]
    report = compare(rows, places, 2)
    assert [(one.rank, one.host) for one in report.slowest] == [(3, "d"), (1, "b")]
    assert report.slowest[0].ratio == pytest.approx(18 / 13.5)
    data = report.parts["data_seconds"]
    assert (data.min, data.min_rank, data.max, data.max_rank) == (0.0, 1, 0.4, 3)
    assert report.to_dict()["slowest"][0] == {"rank": 3, "host": "d", "ratio": 18 / 13.5}


def test_readings_that_failed_are_left_out() -> None:
    rows = [[1.0, 1.0, 0.0, 60.0, 300.0, 99.0, 1980.0], [1.0, 1.0, 0.0, float("nan"), 1, 2, 3]]
    report = compare(rows, [("a", 0), ("a", 0)], 5)
    assert "gpu_temperature" not in report.parts and report.parts["gpu_clock"].max_rank == 0
    assert len(report.slowest) == 2


class Moody:
    """A logger that fails while its class attribute ``fails`` is true."""

    fails = True

    def __init__(self) -> None:
        self.seen: list[object] = []
        self._answer()

    def _answer(self) -> None:
        if Moody.fails:
            raise RuntimeError("the disk is full")

    def on_log(self, report: object) -> None:
        self._answer()
        self.seen.append(report)


def test_a_logger_is_made_again_once_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    made: list[Moody] = []

    def make() -> Moody:
        made.append(Moody())
        return made[-1]

    with caplog.at_level(logging.WARNING):
        Moody.fails = True
        isolated = IsolatedCallback(make)  # type: ignore[arg-type]
        isolated.on_log(1)  # type: ignore[arg-type]
        assert not made and caplog.text.count("training continues without it") == 1
        Moody.fails = False
        isolated.on_log(2)  # type: ignore[arg-type]
        assert made[0].seen == [2] and "works again" in caplog.text
        Moody.fails = True
        isolated.on_log(3)  # type: ignore[arg-type]
        Moody.fails = False
        isolated.on_log(4)  # type: ignore[arg-type]
    assert made[0].seen == [2, 4] and len(made) == 1


def _window(make_config, *, is_cuda: bool = False, **logging_section: object) -> ProfilerWindow:
    changes = {f"logging__{name}": value for name, value in logging_section.items()}
    ranks = SimpleNamespace(is_cuda=is_cuda, process=SimpleNamespace(rank=0, world_size=2))
    return ProfilerWindow(make_config(checkpoint__save="run", **changes), ranks)  # type: ignore[arg-type]


def test_profiles_that_cannot_be_made_are_refused(make_config) -> None:
    with pytest.raises(UserError, match="NVTX ranges need CUDA"):
        _window(make_config, profile=True)
    with pytest.raises(UserError, match=r"profile_ranks: 2 is not a rank of this run"):
        _window(make_config, profile=True, use_pytorch_profiler=True, profile_ranks=[0, 2])
    with pytest.raises(UserError, match=r"profile_step_start: 5 is not below"):
        _window(make_config, profile=True, profile_step_start=5, profile_step_end=5)
    with pytest.raises(UserError, match=r"use_pytorch_profiler: needs logging\.profile"):
        _window(make_config, use_pytorch_profiler=True)
    with pytest.raises(UserError, match=r"wandb_exp_name: needs logging\.wandb_project"):
        _window(make_config, wandb_exp_name="x")

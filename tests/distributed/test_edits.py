"""Tests edits of a schedule during a run, from the command line to the checkpoint and back."""

import json
from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml
from tiny_run import TinyRun


def _config(tiny_run: TinyRun, path: Path, **data: Any) -> Path:
    """Writes the tiny run's configuration with parts of its data section replaced."""
    values = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
    values["data"].update(data)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _first_knot() -> dict[str, Any]:
    return {"at": 0, "weights": {"first": 0.9, "second": 0.1}}


def _command(config: Path, folder: Path, *flags: object) -> list[str]:
    return jobs.pretrain("--config", config, "--save", folder, "--load", folder, *flags)


@pytest.mark.distributed
def test_the_future_may_be_edited_and_the_edit_is_replayed(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    steady = _config(tiny_run, tmp_path / "steady.yaml", schedule={"knots": [_first_knot()]})
    later = {"at": 32, "weights": {"first": 0.25, "second": 0.75}}
    edited = _config(tiny_run, tmp_path / "edited.yaml", schedule={"knots": [_first_knot(), later]})
    folder = tmp_path / "run"
    jobs.run(_command(steady, folder, "--exit-interval", 4))
    output = jobs.run(_command(edited, folder, "--exit-interval", 7))
    assert output.count("schedule edited at sample 32; every prefix stays within") == 1
    # A second resume has nothing to edit, because the checkpoint holds the new segment.
    assert "schedule edited" not in jobs.run(_command(edited, folder))

    straight = tmp_path / "straight"
    jobs.run(_command(edited, straight))
    found, expected = jobs.read_metrics(folder)[0], jobs.read_metrics(straight)[0]
    digests = [entry["batch_digest"] for entry in found]
    assert digests[:4] == [entry["batch_digest"] for entry in expected][:4]
    counts = {
        name: sum(round(entry["sources"][name]["realised"] * 8) for entry in found[4:])
        for name in ("first", "second")
    }
    # 48 samples with weights 1/4 and 3/4: each count is within one of its quota.
    assert abs(counts["first"] - 12) <= 1 and counts["first"] + counts["second"] == 48
    assert found[-1]["sources"]["second"]["weight"] == pytest.approx(0.75)


@pytest.mark.distributed
def test_a_source_joins_in_mid_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    first = {"paths": [str(tiny_run.folder / "first_text_document")]}
    second = {"paths": [str(tiny_run.folder / "second_text_document")]}
    alone = _config(
        tiny_run,
        tmp_path / "alone.yaml",
        sources={"first": first},
        schedule={"knots": [{"at": 0, "weights": {"first": 1}}]},
    )
    both = _config(
        tiny_run,
        tmp_path / "both.yaml",
        sources={"first": first, "second": second},
        schedule={
            "knots": [
                {"at": 0, "weights": {"first": 1}},
                {"at": 32, "weights": {"first": 1, "second": 1}},
            ]
        },
    )
    folder = tmp_path / "run"
    jobs.run(_command(alone, folder, "--exit-interval", 4))
    assert "added second" in jobs.run(_command(both, folder))
    iterations, _ = jobs.read_metrics(folder)
    assert len(iterations) == 10
    assert "second" not in iterations[3]["sources"]
    (restart,) = map(json.loads, (folder / "restarts.jsonl").read_text().splitlines())
    assert restart["changes"] == ["schedule edited", "source second added"]
    drawn = sum(entry["sources"]["second"]["realised"] for entry in iterations[4:])
    assert drawn == pytest.approx(3.0, abs=0.25)


@pytest.mark.distributed
def test_another_global_batch_size_keeps_the_sequence(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    jobs.run(_command(tiny_run.config, folder, "--exit-interval", 4))
    jobs.run(_command(tiny_run.config, folder, "--global-batch-size", 16, "--train-iters", 7))
    jobs.run(jobs.pretrain("--config", tiny_run.config, "--save", tmp_path / "whole"))
    found, expected = (
        jobs.read_metrics(path)[0][-1]["sources"] for path in (folder, tmp_path / "whole")
    )
    # 4 x 8 + 3 x 16 = 10 x 8 samples: each source has the same draws.
    for name, source in expected.items():
        assert found[name]["tokens"] == source["tokens"]

"""Tests that ``metrics.jsonl`` has every iteration once, however the previous run ended."""

import json
from pathlib import Path

from megatron_chatflow.training.callbacks.metrics_file import truncate_metrics


def test_lines_after_the_checkpoint_and_torn_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": i, "lm_loss": 1.0}) for i in range(1, 6)]
    path.write_text(
        "\n".join([*lines[:3], '{"iteration": 3, "validation": {}}', *lines[3:]]) + '\n{"iter'
    )
    truncate_metrics(path, 3)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["iteration"] for entry in kept] == [1, 2, 3, 3]
    assert not list(tmp_path.glob(".*"))


def test_a_run_without_a_record_is_fine(tmp_path: Path) -> None:
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())

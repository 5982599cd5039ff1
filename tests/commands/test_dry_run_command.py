"""Tests the command line of a dry run."""

from fork_server import run_forked
from tiny_run import TinyRun


def test_the_command_line_needs_no_process_group(tiny_run: TinyRun) -> None:
    command = ["-m", "megatron_chatflow.pretrain", "--config", tiny_run.config]
    result = run_forked([*command, "--dry-run", "--world-size", "4", "--bf16"])
    assert result.returncode == 0, result.stderr
    assert "4 processes: 1 per copy of the model, 4 copies" in result.stdout
    assert "predicted for 4 x h100, not measured: " in result.stdout

"""Runs the tests of ``tests/gpu`` on a simulated GPU as far as they can run, in one process."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from simulator import ROOT

from megatron_chatflow.simulate.shim import library_path

WORKER = Path(__file__).with_name("gpu_tests_worker.py")
# These compute everything, and end where they compare numbers that nothing has computed.
COMPARED = {
    "test_a_window_hides_what_lies_before_it",
    "test_equals_fp32",
    "test_fewer_queries_than_keys_equal_fp32",
    "test_linear_cross_entropy",
    "test_micro_batches_add_up_in_fp32",
    "test_steps_follow_those_of_a_cpu",
    "test_steps_of_other_architectures_follow_those_of_a_cpu",
    "test_the_first_step_in_bf16_is_near_a_cpu_s_in_fp32",
}
PASSED = {"test_operators_are_whole"}


def test_the_tests_that_need_a_gpu_run_until_they_compare_numbers(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, WORKER, library_path(), result],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.exists(), done.stderr
    outcomes: dict[str, set[str]] = defaultdict(set)
    for name, (outcome, reason) in json.loads(result.read_text()).items():
        print(name, outcome, reason)
        function = name.partition("::")[2].partition("[")[0]
        outcomes[outcome].add(function)
        if outcome == "skipped":
            assert "is not installed" in reason, (name, reason)
    assert not outcomes["failed"], done.stdout + done.stderr
    assert outcomes["compared"] == COMPARED
    assert outcomes["passed"] == PASSED

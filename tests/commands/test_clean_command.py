"""Tests cleaning with several processes: the same bytes, and a mistake as one line."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

TOOL = Path(__file__).parents[2] / "tools" / "clean_corpus.py"
TEXT = "The river rises in the hills north of the town and reaches the sea after ninety miles."


# Stand-ins for Slurm's commands, which run the tasks of a job at once and one after the other.
SLURM = {
    "sbatch": """#!/bin/bash
script=${@: -1}
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "${last:-0}"); do
    export SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=7 SLURM_NODELIST=node
    bash "$script" >> "$0.log" 2>&1 || exit 1
done
echo "$*" >> "$0.calls"
echo "Submitted batch job 7"
""",
    "srun": """#!/bin/bash
while [[ $1 == -* || $1 =~ ^[0-9]+$ ]]; do shift; done
exec "$@"
""",
    "scontrol": "#!/bin/bash\necho node\n",
}


def run(
    *arguments: object, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for k in range(4):
        texts = [f"{TEXT} {word} {k % 2}" for word in ("Ships", "Trains", "Roads")]
        lines = [json.dumps({"text": text, "file": k}) + "\n" for text in texts]
        (tmp_path / "in" / f"{k}.jsonl").write_text("".join(lines) if k < 3 else "")
    for workers in (1, 2):
        done = run(
            *("run", "--input", tmp_path / "in", "--output", tmp_path / f"out{workers}"),
            *("--minhash", "--workers", workers),
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert sorted(path.name for path in (tmp_path / "out2").iterdir()) == names
    assert len(names) > 1
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "a"}\n')
    done = run("run", "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no document left: read 0")


@pytest.mark.slow
def test_slurm_runs_the_stages_and_publishes_the_output(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for k in range(2):
        (tmp_path / "in" / f"{k}.jsonl").write_text(json.dumps({"text": f"{TEXT} {k}"}) + "\n")
    (tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    root = str(TOOL.parents[1])
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": root}
    done = run(
        *("run", "--input", tmp_path / "in", "--output", tmp_path / "out"),
        *("--slurm-partition", "cpu", "--workers", 2),
        environment=environment,
    )
    log = tmp_path / "bin" / "sbatch.log"
    assert done.returncode == 0, f"{done.stderr}{log.read_text() if log.exists() else ''}"
    assert done.stdout == f"submitted; the last job gives {tmp_path / 'out'} its name\n"
    here = run("run", "--input", tmp_path / "in", "--output", tmp_path / "here", "--workers", 1)
    assert here.returncode == 0, here.stderr
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    calls = (tmp_path / "bin" / "sbatch.calls").read_text()
    assert "--dependency=afterok:7" in calls
    assert (
        "--partition=cpu" in (tmp_path / "out.partial/logs/filter/launch_script.slurm").read_text()
    )

"""Simulates ranks for tests: one worker process, and configurations for it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_chatflow.config import RunConfig, load_config
from megatron_chatflow.simulate.inputs import SimulatedInputs, prepare
from megatron_chatflow.simulate.observer import Observation
from megatron_chatflow.simulate.run import observation_of
from megatron_chatflow.simulate.shim import library_path
from megatron_chatflow.simulate.worker import Failure

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "llama2_7b"


class Simulator:
    """Runs cases in forks of one worker process.

    Args:
        folder: A folder for configurations, generated inputs, results and logs.
        libraries: A folder of libraries that only the worker can import.
    """

    def __init__(self, folder: Path, libraries: Path | None = None) -> None:
        self._folder = folder
        self._num_cases = 0
        self._worker = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("simulation_worker.py"), library_path()],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(libraries or ROOT), str(ROOT)]),
                # The worker gets a library, and must not compile another.
                "XDG_CACHE_HOME": str(folder),
                "CXX": "no-compiler",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._worker.stdout is not None
        return self._worker.stdout.readline().strip()

    def close(self) -> None:
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait()

    def run_file(
        self,
        config: Path,
        *,
        world_size: int = 1,
        rank: int = 0,
        gpu: str = "h100",
        mutation: str | None = None,
    ) -> Observation | Failure:
        """Runs a YAML file as it is."""
        case = {"config": str(config), "gpu": gpu, "world_size": world_size, "rank": rank}
        (found,) = self._run([{**case, "mutation": mutation}])
        return found

    def run_job(self, config: Path, *, world_size: int) -> list[Observation | Failure]:
        """Runs all ranks of a YAML file at the same time, which exchange objects."""
        store = str(self._folder / f"store_{self._num_cases}")
        case = {"config": str(config), "gpu": "h100", "world_size": world_size, "store": store}
        return self._run([{**case, "rank": rank, "mutation": None} for rank in range(world_size)])

    def _run(self, cases: list[dict[str, Any]]) -> list[Observation | Failure]:
        paths = []
        for case in cases:
            self._num_cases += 1
            paths.append(self._folder / f"{self._num_cases}")
            case["result"] = f"{paths[-1]}.json"
            case["log"] = f"{paths[-1]}.log"
        assert self._worker.stdin is not None
        print(json.dumps(cases), file=self._worker.stdin, flush=True)
        assert self._answer() == "done"
        return [_result(path) for path in paths]

    def prepare(self, config: RunConfig, world_size: int) -> tuple[SimulatedInputs, Path]:
        """Returns what `simulate` would run, and its YAML file."""
        folder = self._folder / f"inputs_{self._num_cases}"
        folder.mkdir(exist_ok=True)
        inputs = prepare(config, world_size, folder)
        path = folder / "run.yaml"
        path.write_text(inputs.config.to_yaml(), encoding="utf-8")
        return inputs, path

    def run(self, config: RunConfig, *, world_size: int, **options: Any) -> Observation | Failure:
        """Runs a configuration as ``--dry-run --simulate`` does."""
        _, path = self.prepare(config, world_size)
        return self.run_file(path, world_size=world_size, **options)

    def observe(self, config: RunConfig, *, world_size: int, **options: Any) -> Observation:
        """Runs a configuration that must not fail."""
        result = self.run(config, world_size=world_size, **options)
        assert isinstance(result, Observation), result
        return result


def _result(path: Path) -> Observation | Failure:
    result, log = path.with_suffix(".json"), path.with_suffix(".log")
    text = log.read_text(encoding="utf-8", errors="replace")
    if not result.exists():
        return Failure(f"the process ended: {text[-2000:]}", "", "")
    content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "failure" in content:
        failure = Failure(**content["failure"])
        print(text, failure.traceback)
        return failure
    return observation_of(content["observation"])


def example(name: str, *flags: str) -> RunConfig:
    """Loads a configuration of the LLaMA-2 page."""
    return load_config(EXAMPLES / name, flags)


def write_config(path: Path, base: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """Writes a YAML file with sections changed."""
    values = yaml.safe_load(base.read_text(encoding="utf-8"))
    for section, given in changes.items():
        values[section] = {**values.get(section, {}), **given}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path

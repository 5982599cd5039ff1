"""Makes the corpora, runs cases until the time is up, and saves the findings."""

import argparse
import importlib
import json
import pkgutil
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuzz.case import Command, Damage, Kind, Result, copy_corpus, judge, matches, run_command
from fuzz.sandbox import Limits, run_limited

_CASE = "case.json"
_NO_DAMAGE = Damage("", "none")


def main() -> int:
    """Parses the command line and fuzzes. Returns 1 if there is a finding."""
    from fuzz.kinds import KINDS

    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=120, help="after which no case begins (%(default)s)")
    add("--seed", type=int, default=1, help="other seeds damage in other ways (%(default)s)")
    add("--only", action="append", choices=list(KINDS), help="kind of file (repeatable)")
    add("--replay", type=Path, metavar="CASE", help="run one saved finding again")
    add("--output", type=Path, default=Path("runs/fuzz"), help="where findings go (%(default)s)")
    arguments = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        if arguments.replay is not None:
            return replay(arguments.replay, KINDS, Path(name))
        fuzzer = Fuzzer(Path(name), arguments.output, arguments.seed)
        chosen = [KINDS[kind] for kind in arguments.only or KINDS]
        for kind in _with_needs(chosen, KINDS):
            fuzzer.prepare(kind, is_fuzzed=kind in chosen)
        return fuzzer.run(chosen, arguments.seconds)


def import_everything() -> None:
    """Imports the package with all of its dependencies, so that cases need not."""
    import torch

    torch.set_num_threads(1)
    from megatron_chatflow.runtime import cpu

    cpu.install()  # megatron-core must be imported after this
    import megatron_chatflow

    for module in pkgutil.walk_packages(megatron_chatflow.__path__, "megatron_chatflow."):
        try:
            importlib.import_module(module.name)
        except ImportError:  # an optional package
            continue
    for name in ("transformers", "pyarrow.parquet", "jinja2.sandbox", "safetensors.torch"):
        importlib.import_module(name)
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    if num_threads > 1:
        print(f"warning: forks with {num_threads} threads", file=sys.stderr)


def _with_needs(chosen: Sequence[Kind], kinds: dict[str, Kind]) -> list[Kind]:
    """Returns the chosen kinds, each after the kinds whose corpora it needs."""
    found: dict[str, Kind] = {}

    def visit(kind: Kind) -> None:
        for name in kind.needs:
            visit(kinds[name])
        found.setdefault(kind.name, kind)

    for kind in chosen:
        visit(kind)
    return list(found.values())


@dataclass
class Counts:
    """Counts the results of a kind's cases."""

    num_cases: int = 0
    num_refused: int = 0
    num_accepted: int = 0
    seconds: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)


class Fuzzer:
    """Runs cases and keeps its findings."""

    def __init__(self, work: Path, output: Path, seed: int) -> None:
        """Initializes the fuzzer. `prepare` makes the corpora.

        Args:
            work: A folder for corpora and cases.
            output: The folder for findings.
            seed: Seed of all damage.
        """
        self._work, self._output, self._seed = work, output, seed
        self._expected: dict[tuple[str, str], Result] = {}
        self.counts: dict[str, Counts] = {}

    def prepare(self, kind: Kind, *, is_fuzzed: bool = True) -> None:
        """Makes a kind's corpus and runs its commands on it undamaged.

        Raises:
            RuntimeError: A command fails although nothing is damaged.
        """
        corpus = self._work / "corpora" / kind.name
        corpus.mkdir(parents=True)
        limits = Limits(cpu_seconds=120, wall_seconds=600)
        outcome = run_limited(lambda: kind.make(corpus), corpus, self._work / "logs", limits)
        if outcome.status != 0:
            raise RuntimeError(f"cannot make the corpus of {kind.name}: {outcome.stderr}")
        for command in kind.commands if is_fuzzed else ():
            result = self._run(kind, command, _NO_DAMAGE)
            problem = judge(command, None, result, None, kind.limits)
            if problem or result.outcome.status == 2:
                raise RuntimeError(
                    f"{kind.name}: {command.name} fails on undamaged files: "
                    f"{problem or result.outcome.stderr}"
                )
            self._expected[kind.name, command.name] = result

    def _run(self, kind: Kind, command: Command, damage: Damage) -> Result:
        """Runs a command in the working folder.

        Without damage, the corpus is copied there first.
        """
        folder = self._work / "case"
        if damage is _NO_DAMAGE:
            copy_corpus(self._work / "corpora" / kind.name, folder)
        return run_command(command, damage, folder, self._work / "logs", kind.limits)

    def run(self, kinds: Sequence[Kind], seconds: float) -> int:
        """Runs cases, each of the kind that has used the least time so far.

        Returns:
            1 if there is a finding, else 0.
        """
        begin = time.monotonic()
        for kind in kinds:
            self.counts.setdefault(kind.name, Counts())
        while time.monotonic() - begin < seconds:
            kind = min(kinds, key=lambda kind: self.counts[kind.name].seconds)
            self.run_case(kind, self.counts[kind.name].num_cases)
        return self._report()

    def run_case(self, kind: Kind, number: int) -> str | None:
        """Runs the ``number``-th case of a kind. Returns the finding, or None."""
        counts = self.counts.setdefault(kind.name, Counts())
        begin = time.monotonic()
        rng = random.Random(f"{self._seed} {kind.name} {number}")
        folder, kept = self._work / "case", self._work / "kept"
        copy_corpus(self._work / "corpora" / kind.name, folder)
        damage = kind.damage(folder, rng)
        readers = [command for command in kind.commands if matches(damage.file, command.reads)]
        command = rng.choice(readers)
        copy_corpus(folder, kept)
        result = self._run(kind, command, damage)
        expected = self._expected.get((kind.name, command.name))
        original = self._work / "corpora" / kind.name / damage.file
        is_same = (self._work / "kept" / damage.file).read_bytes() == original.read_bytes()
        judged = None if is_same else damage  # for example, a list of one entry cannot be shuffled
        problem = judge(command, judged, result, expected, kind.limits)
        counts.num_cases += 1
        counts.num_refused += result.outcome.status == 2
        counts.num_accepted += result.outcome.status == 0
        counts.seconds += time.monotonic() - begin
        if problem is not None:
            signature = f"{command.name}: {problem}"
            counts.findings[signature] += 1
            if counts.findings[signature] == 1:
                self._save(kind, number, command, damage, result, problem)
        return problem

    def _save(
        self,
        kind: Kind,
        number: int,
        command: Command,
        damage: Damage,
        result: Result,
        problem: str,
    ) -> None:
        folder = self._output / f"{kind.name}-{self._seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.move(self._work / "kept", folder / "files")
        (folder / "stdout.txt").write_text(result.outcome.stdout, errors="replace")
        (folder / "stderr.txt").write_text(result.outcome.stderr, errors="replace")
        case = {"kind": kind.name, "command": command.name, "damage": asdict(damage)}
        expected = self._expected.get((kind.name, command.name))
        case |= {"problem": problem, "expected": expected.digests if expected else {}}
        if not callable(command.run):
            case["command_line"] = shlex.join(command.run)
        (folder / _CASE).write_text(json.dumps(case, indent=2) + "\n")
        print(f"finding: {kind.name}: {command.name}: {problem}")
        print(f"  {damage.file}: {damage.how[:200]}")
        print(f"  replay with: make fuzz REPLAY={folder}", flush=True)

    def _report(self) -> int:
        num_findings = sum(len(counts.findings) for counts in self.counts.values())
        print(
            f"{'kind':14}{'cases':>8}{'refused':>9}{'accepted':>10}{'s a case':>10}{'findings':>10}"
        )
        for name, counts in self.counts.items():
            print(
                f"{name:14}{counts.num_cases:8}{counts.num_refused:9}{counts.num_accepted:10}"
                f"{counts.seconds / max(counts.num_cases, 1):10.2f}{len(counts.findings):10}"
            )
        num_cases = sum(counts.num_cases for counts in self.counts.values())
        print(f"{num_cases} cases, {num_findings} different findings")
        return 1 if num_findings else 0


def replay(case: Path, kinds: dict[str, Kind], work: Path) -> int:
    """Runs a saved finding again. Returns 1 if it is still a finding."""
    saved = json.loads((case / _CASE).read_text())
    kind = kinds[saved["kind"]]
    command, damage = kind.command(saved["command"]), Damage(**saved["damage"])
    copy_corpus(case / "files", work / "case")
    result = run_command(command, damage, work / "case", work / "logs", kind.limits)
    print(result.outcome.stdout, end="")
    print(result.outcome.stderr, end="", file=sys.stderr)
    expected = Result(result.outcome, saved["expected"], ())
    problem = judge(command, damage, result, expected, kind.limits)
    print(f"exit status {result.outcome.status}: {problem or 'no finding any more'}")
    return 0 if problem is None else 1

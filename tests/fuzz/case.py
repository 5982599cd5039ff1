"""Runs one case: damages a copy of a corpus, runs a command that reads it, and judges the result.

Each of the following is a finding:

- a traceback, a Rust panic, a signal, or an exit status other than 0 and 2;
- memory or time above the limits;
- an error message that is not one line of at most 1,000 characters;
- after an error, a file under its final name or a leftover file;
- after success, a missing output or a leftover file;
- success with a result that differs from that of the undamaged files, although hashes or the
  structure of the file reveal the damage;
- success with an output that the project's own checks refuse.
"""

import fnmatch
import hashlib
import random
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.sandbox import Limits, Outcome, run_limited
from megatron_chatflow.errors import MAX_MESSAGE_CHARACTERS

REPOSITORY = Path(__file__).parents[2]
MAX_MESSAGE = len("error: ") + MAX_MESSAGE_CHARACTERS
PLANTED = "planted"
"""A file of this name in the working folder shows that a file's content was run as code."""


@dataclass(frozen=True)
class Damage:
    """Describes the damage to a corpus.

    Attributes:
        file: The damaged file, relative to the corpus.
        how: Description of the damage, for reports and for `Command.is_covered`.
    """

    file: str
    how: str


def never(damage: Damage) -> bool:
    """Returns False: no damage is covered."""
    return False


@dataclass(frozen=True)
class Command:
    """A command that reads a corpus.

    Attributes:
        name: Name in reports.
        run: Name of a tool with its arguments, or a function. Runs in the corpus's folder.
        outputs: Globs of the output files, which must not exist after an error.
        may_write: Globs of other files that the command may leave behind.
        compared: Globs of the files by which two results are compared.
        is_covered: Returns whether the command must notice a damage. If so, success is a finding
            unless the files in ``compared`` are those of the undamaged corpus.
        statuses: Exit statuses that are not findings.
        reads: Globs of the files that this command reads. It only runs if one of them is damaged.
        check: Checks the folder after success and raises if something is wrong.
    """

    name: str
    run: Sequence[str] | Callable[[], object]
    outputs: Sequence[str] = ()
    may_write: Sequence[str] = ()
    compared: Sequence[str] = ()
    is_covered: Callable[[Damage], bool] = never
    statuses: Sequence[int] = (0, 2)
    reads: Sequence[str] = ("*",)
    check: Callable[[Path, Damage], None] | None = None

    def call(self) -> object:
        """Runs the command in this process, as its command line would."""
        if callable(self.run):
            return self.run()
        name, *arguments = self.run
        sys.argv = [name, *arguments]
        if name.endswith(".py"):
            runpy.run_path(str(REPOSITORY / "tools" / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        return None

    def call_to_end(self) -> None:
        """Runs the command in this process and returns.

        Raises:
            RuntimeError: The command failed.
        """
        try:
            self.call()
        except SystemExit as error:
            if error.code:
                raise RuntimeError(f"{self.run}: exit status {error.code}") from None


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: Name for ``--only``.
        make: Writes the undamaged corpus into a folder. Runs in a separate process.
        damage: Damages one file of a copy of the corpus.
        commands: The commands that read the corpus.
        needs: Kinds whose folders ``make`` reads. They are siblings of its own folder.
        limits: Resource limits of a case.
    """

    name: str
    make: Callable[[Path], None]
    damage: Callable[[Path, random.Random], Damage]
    commands: Sequence[Command]
    needs: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)

    def command(self, name: str) -> Command:
        """Returns the command with this name."""
        return next(command for command in self.commands if command.name == name)


@dataclass(frozen=True)
class Result:
    """The result of a command.

    Attributes:
        outcome: How its process ended.
        digests: Digests of the files in `Command.compared`, by name.
        written: New or changed files, relative to the working folder.
        problem: The error raised by `Command.check`, empty if there is none.
    """

    outcome: Outcome
    digests: dict[str, str]
    written: tuple[str, ...]
    problem: str = ""


def run_command(
    command: Command, damage: Damage, folder: Path, logs: Path, limits: Limits
) -> Result:
    """Runs a command in a folder that holds a damaged or undamaged corpus."""
    before = _listing(folder)
    outcome = run_limited(command.call, folder, logs, limits)
    after = _listing(folder)
    written = tuple(name for name in sorted(after) if before.get(name) != after[name])
    written += tuple(f"{name} (removed)" for name in sorted(before.keys() - after.keys()))
    problem = ""
    if outcome.status == 0 and command.check is not None:
        check = command.check
        checked = run_limited(lambda: check(folder, damage), folder, logs / "check", limits)
        if checked.status != 0:
            lines = checked.stderr.strip().splitlines() or [f"status {checked.status}"]
            problem = f"the result is refused: {lines[-1][:300]}"
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in after
        if matches(name, command.compared)
    }
    return Result(outcome, digests, written, problem)


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            status = path.lstat()
            found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a name matches one of the globs. ``*`` also matches slashes."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def judge(
    command: Command, damage: Damage | None, result: Result, expected: Result | None, limits: Limits
) -> str | None:
    """Judges a result.

    Args:
        command: The command that was run.
        damage: The damage to the corpus, None if there is none.
        result: The result of the command.
        expected: The result for the undamaged corpus.
        limits: The limits that applied to the command.

    Returns:
        The first line of the finding, None if there is none.
    """
    outcome = result.outcome
    told = outcome.stderr
    if outcome.is_late:
        return f"did not end within {limits.wall_seconds:g} s"
    if outcome.status < 0:
        return f"ended by signal {-outcome.status}: {_last_line(told)}"
    if PLANTED in {Path(name).name for name in result.written}:
        return "ran code of a file"
    if "Traceback (most recent call last)" in told:
        return f"traceback: {_last_line(told)}"
    if " panicked at " in told:
        return f"panic: {_last_line(told)}"
    if outcome.status not in command.statuses:
        return f"exit status {outcome.status}: {_last_line(told)}"
    if outcome.cpu_seconds > limits.cpu_seconds:
        return f"took {outcome.cpu_seconds:.0f} s of processor time"
    if outcome.memory_bytes > limits.memory_bytes:
        return f"took {outcome.memory_bytes / 1e9:.1f} GB of memory"
    allowed = [*command.outputs, *command.may_write] if outcome.status == 0 else command.may_write
    for name in result.written:
        if not matches(name, allowed):
            return f"exit status {outcome.status} and leaves {name}"
    if outcome.status == 2:
        return _judge_message(told)
    for pattern in command.outputs if outcome.status == 0 else ():
        if not any(matches(name, [pattern]) for name in result.written):
            return f"exit status 0 without {pattern}"
    if result.problem:
        return result.problem
    if outcome.status == 0 and damage is not None and expected is not None:
        is_same = bool(command.compared) and result.digests == expected.digests
        if command.is_covered(damage) and not is_same:
            what = "another result" if command.compared else "success"
            return f"silently takes a damaged {Path(damage.file).name}: {what}"
    return None


def _judge_message(told: str) -> str | None:
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    if len(errors) != 1:
        return f"exit status 2 with {len(errors)} lines of error: {_last_line(told)}"
    if len(errors[0]) < len("error: ") + 8:
        return f"an error without a reason: {errors[0]!r}"
    if told.rstrip().splitlines()[-1] != errors[0]:
        return f"an error of several lines: {_last_line(told)}"
    if len(errors[0]) > MAX_MESSAGE:
        return f"an error of {len(errors[0])} characters: {errors[0][:120]}"
    return None


def _last_line(told: str) -> str:
    lines = [line for line in told.strip().splitlines() if line.strip()]
    # faulthandler's list of extension modules carries no information.
    lines = [line for line in lines if not line.startswith("Extension modules")]
    return lines[-1].strip()[:300] if lines else "nothing on standard error"


def copy_corpus(source: Path, target: Path) -> None:
    """Replaces a working folder by a copy of a corpus."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, symlinks=True)

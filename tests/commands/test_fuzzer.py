"""Tests that the fuzzer finds every kind of fault, in commands with deliberate faults."""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.case import Command, Damage, Kind
from fuzz.run import Fuzzer, replay
from fuzz.sandbox import Limits, run_limited

from megatron_chatflow.errors import UserError, run_main

pytestmark = pytest.mark.slow

LIMITS = Limits(cpu_seconds=2, wall_seconds=20, memory_bytes=64 << 20, address_bytes=256 << 20)


def make(folder: Path) -> None:
    (folder / "a.txt").write_text("0123456789")


def damage(folder: Path, rng: random.Random) -> Damage:
    (folder / "a.txt").write_text(f"damaged {rng.random()}")
    return Damage("a.txt", "replaced")


def is_damaged() -> bool:
    return Path("a.txt").read_text().startswith("damaged")


def on_damage(fault: Callable[[], object]) -> Callable[[], object]:
    """Returns a command that writes `out.txt` and has a fault if the file is damaged."""

    def run() -> object:
        result = fault() if is_damaged() else None
        Path("out.txt").write_text("done")
        return result

    return run


def refuse(message: str, *, leaves: str = "") -> Callable[[], object]:
    def main() -> None:
        if leaves:
            Path(leaves).write_text("half")
        raise UserError(message)

    return lambda: run_main(main)


SEVERAL_LINES = "error: a.txt is damaged\nhere"


def say_and_exit(status: int, message: str) -> Callable[[], object]:
    def run() -> object:
        print(message, file=sys.stderr)
        sys.exit(status)

    return run


def use_time() -> None:
    while True:
        pass


def use_memory() -> None:
    """Allocates 128 MiB in blocks that malloc reuses from freed memory, and fills them."""
    blocks = [bytearray(1000) for _ in range((128 << 20) // 1000)]
    del blocks


def crash() -> None:
    os.kill(os.getpid(), 11)


def panic() -> None:
    raise KeyError("a")


def change_input() -> None:
    Path("a.txt").write_text("damaged otherwise")


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "traceback": (panic, "traceback: KeyError: 'a'"),
    "panic": (
        say_and_exit(2, "thread 'main' panicked at a.rs:1:2:\nerror: a.txt is damaged"),
        "panic: error: a.txt",
    ),
    "signal": (crash, "ended by signal 11"),
    "status": (say_and_exit(1, "oh"), "exit status 1: oh"),
    "time": (use_time, "ended by signal 24"),
    "memory": (use_memory, "took 0.1 GB of memory"),
    "far too much memory": (lambda: bytearray(1 << 40), "traceback: MemoryError"),
    "leftover": (refuse("a.txt: is damaged; copy it again", leaves="out.txt"), "leaves out.txt"),
    "temporary file": (refuse("a.txt: is damaged", leaves=".out.tmp"), "leaves .out.tmp"),
    "long message": (say_and_exit(2, "error: " + "x" * 1001), "an error of 1008 characters"),
    "empty message": (refuse(""), "an error without a reason"),
    "several lines": (
        say_and_exit(2, "error: a.txt is damaged\nhere"),
        "an error of several lines",
    ),
    "no line": (say_and_exit(2, "damaged"), "exit status 2 with 0 lines of error"),
    "code": (lambda: Path("planted").touch(), "ran code of a file"),
    "input changed": (change_input, "leaves a.txt"),
    "silent": (lambda: None, "silently takes a damaged a.txt"),
}


def fuzzer_of(command: Command, tmp_path: Path) -> tuple[Fuzzer, Kind]:
    kind = Kind("made-up", make, damage, [command], limits=LIMITS)
    fuzzer = Fuzzer(tmp_path / "work", tmp_path / "found", seed=1)
    fuzzer.prepare(kind)
    return fuzzer, kind


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_replayed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, message = FAULTS[name]
    command = Command("faulty", on_damage(fault), outputs=["out.txt"], is_covered=lambda d: True)
    fuzzer, kind = fuzzer_of(command, tmp_path)
    problem = fuzzer.run_case(kind, 0)
    assert problem is not None and message in problem
    assert fuzzer.run_case(kind, 1) is not None
    assert len(list((tmp_path / "found").iterdir())) == 1  # the same finding is saved once
    saved = tmp_path / "found" / "made-up-1-0"
    assert f"REPLAY={saved}" in capsys.readouterr().out
    assert (saved / "files" / "a.txt").read_text().startswith("damaged")
    assert replay(saved, {kind.name: kind}, tmp_path / "replayed") == 1
    assert message in capsys.readouterr().out
    mended = Kind("made-up", make, damage, [Command("faulty", refuse("a.txt: is damaged"))])
    assert replay(saved, {kind.name: mended}, tmp_path / "replayed") == 0


def test_memory_is_measured_in_a_process_that_was_large(tmp_path: Path) -> None:
    blocks = [bytearray(1000) for _ in range(1 << 20)]
    last = bytearray(1000)  # allocated above them, so that malloc keeps their pages
    del blocks
    outcome = run_limited(use_memory, tmp_path, tmp_path / "logs")
    assert outcome.status == 0
    assert 128 << 20 <= outcome.memory_bytes < 160 << 20
    assert len(last) == 1000


def test_a_hang_is_ended(tmp_path: Path) -> None:
    limits = Limits(wall_seconds=0.2)
    fuzzer = Fuzzer(tmp_path / "work", tmp_path / "found", seed=1)
    command = Command("hangs", on_damage(lambda: time.sleep(60)), outputs=["out.txt"])
    kind = Kind("made-up", make, damage, [command], limits=limits)
    fuzzer.prepare(Kind("made-up", make, damage, []))
    assert fuzzer.run_case(kind, 0) == "did not end within 0.2 s"


def test_what_is_right_is_no_finding(tmp_path: Path) -> None:
    good = on_damage(refuse("a.txt: is damaged; copy it again"))
    command = Command("good", good, outputs=["out.txt"], is_covered=lambda damage: True)
    fuzzer, kind = fuzzer_of(command, tmp_path)
    assert fuzzer.run_case(kind, 0) is None
    same = on_damage(lambda: None)
    command = Command(
        "same", same, outputs=["out.txt"], compared=["out.txt"], is_covered=lambda damage: True
    )
    (tmp_path / "other").mkdir()
    fuzzer, kind = fuzzer_of(command, tmp_path / "other")
    assert fuzzer.run_case(kind, 0) is None
    assert fuzzer.run([kind], seconds=0.5) == 0
    assert fuzzer.counts["made-up"].num_accepted == fuzzer.counts["made-up"].num_cases > 1


def test_results_are_compared_and_checked(tmp_path: Path) -> None:
    def refuse_page(folder: Path, damage: Damage) -> None:
        if (folder / "out.txt").read_text() != "done":
            raise AssertionError("cut")

    def write() -> None:
        Path("out.txt").write_text(Path("a.txt").read_text() if is_damaged() else "done")

    for number, (command, message) in enumerate(
        [
            (
                Command("other", write, outputs=["out.txt"], compared=["out.txt"],
                        is_covered=lambda damage: True),
                "silently takes a damaged a.txt: another result",
            ),
            (
                Command("refused", write, outputs=["out.txt"], check=refuse_page),
                "the result is refused: AssertionError: cut",
            ),
        ]
    ):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        fuzzer, kind = fuzzer_of(command, tmp_path / str(number))
        assert fuzzer.run_case(kind, 0) == message


def test_commands_that_fail_undamaged_are_no_fuzzing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken fails on undamaged files: exit status 1: oh"):
        fuzzer_of(Command("broken", say_and_exit(1, "oh")), tmp_path)
    with pytest.raises(RuntimeError, match="exit status 0 without out.txt"):
        fuzzer_of(Command("broken", lambda: None, outputs=["out.txt"]), tmp_path / "other")


def test_damage_follows_the_seed(tmp_path: Path) -> None:
    """Each kind's damage is the same for the same case, and changes a file."""
    from fuzz.kinds import KINDS

    assert len(KINDS) == 10
    kind = KINDS["metrics"]
    (tmp_path / "metrics").mkdir()
    kind.make(tmp_path / "metrics")
    path = tmp_path / "metrics" / "run"
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    found = []
    for _ in range(2):
        for name, content in before.items():
            (path / name).write_bytes(content)
        done = kind.damage(tmp_path / "metrics", random.Random("1 metrics 5"))
        after = {file.name: file.read_bytes() for file in path.iterdir()}
        assert [name for name in before if before[name] != after[name]] == [Path(done.file).name]
        found.append((done, after))
    assert found[0] == found[1]

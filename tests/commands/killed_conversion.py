"""Kills conversions at seeded moments, and runs each of them again.

The arguments are `FOLDER SEED`. The folder holds `source` (a Hugging Face folder),
`tokenizer.model` and `pieces.txt`. The exit status is 0 if only complete outputs were ever left
behind. The process imports the heavy libraries once, on one thread, and forks for every command.
"""

import multiprocessing
import os
import random
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.convert import to_huggingface  # noqa: F401

TOOLS = Path(__file__).parents[2] / "tools"
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
NUM_KILLS = 6


def run(command: list[str], folder: Path, end_by: int | None, at: int) -> tuple[int, int]:
    """Runs a tool. A signal ends it before its ``at``-th change below ``folder``.

    Returns:
        Its exit status, negative for a signal, and the number of changes that it reached.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        num_changes = 0

        def before(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal num_changes
            if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not arguments[2] & os.O_ACCMODE:
                return
            num_changes += 1
            if num_changes == at and end_by is not None:
                os.kill(os.getpid(), end_by)

        sys.addaudithook(before)
        sys.argv = [str(TOOLS / command[0]), *command[1:]]
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as caught:
            status = int(caught.code or 0)
        writer.send(num_changes)
        os._exit(status)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode, reader.recv() if reader.poll() else -1


def files_of(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file()
    }


def check(command: list[str], output: Path, rng: random.Random) -> None:
    folder = output.parent
    folder.mkdir()
    status, num_changes = run(command, folder, None, 0)
    assert (status, list(folder.iterdir())) == (0, [output]), command
    expected = set(files_of(output))
    moments = rng.sample(range(1, num_changes + 1), min(NUM_KILLS, num_changes))
    for at in moments:
        for end_by in (signal.SIGKILL, signal.SIGINT):
            again = [*command, "--overwrite"]
            status, _ = run(again, folder, end_by, at)
            assert status == (-signal.SIGKILL if end_by == signal.SIGKILL else 130), (command, at)
            if output.exists():
                assert set(files_of(output)) == expected, (command, at)
            if end_by == signal.SIGINT:
                left = [path.name for path in folder.iterdir()]
                # The signal may arrive during the clean-up.
                assert left == [output.name] or at >= num_changes - len(expected), (left, at)
            status, _ = run(again, folder, None, 0)
            assert status == 0
            assert list(folder.iterdir()) == [output], (command, at)
            assert set(files_of(output)) == expected


def main() -> None:
    root, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    torch.set_num_threads(1)
    source, run_folder, export = root / "source", root / "a" / "run", root / "b" / "export"
    convert = "convert_checkpoint.py"
    check([convert, "import", "--hf", str(source), "--output", str(run_folder)], run_folder, rng)
    flags = ["--checkpoint", str(run_folder), "--no-tokenizer", "--output", str(export)]
    check([convert, "export", *flags], export, rng)
    extended = root / "c" / "extended"
    flags = ["--tokenizer-model", str(root / "tokenizer.model"), "--output-dir", str(extended)]
    flags += ["--list", str(root / "pieces.txt"), "--num-new", "3"]
    check(["extend_vocab.py", *flags], extended, rng)


if __name__ == "__main__":
    main()

"""Checks failing saves and damaged checkpoints on real ranks.

``saver_worker.py failures|damage FLAGS...`` builds the run of the flags as training does.
``saver_worker.py resave JOBS.json`` builds several runs in turn, each of which loads a checkpoint
and saves it again. The exit status is 0 if all checks passed.
"""

import contextlib
import gc
import json
import random
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint.files import MANIFEST
from megatron_chatflow.config import RunConfig, load_config_from_argv
from megatron_chatflow.config.shape import num_model_chunks
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import finalize, initialize
from megatron_chatflow.runtime.ranks import Ranks

NUM_MUTATIONS = 120


@contextlib.contextmanager
def no_room(here: bool) -> Iterator[None]:
    """Limits the file size of this process to 4 KiB if ``here`` is true."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def checkpoints(root: Path) -> list[str]:
    """Returns the names of all checkpoint and staging folders in the run's folder."""
    return sorted(path.name for path in root.iterdir() if "iter_" in path.name)


def failures(run: Any, root: Path, ranks: Ranks) -> None:
    """Lets a save fail on one rank, on the other, and before it begins. The next save succeeds."""
    saver, optimization = run.saver, run.optimization

    def save(iteration: int) -> int | None:
        state = replace(run.checkpoint_state, iteration=iteration, consumed_samples=8 * iteration)
        saver.save(state, optimization.chunks, optimization.optimizer)
        return saver.finish()

    assert save(3) == 3
    for number, failing in enumerate(range(ranks.process.world_size)):
        with no_room(ranks.process.rank == failing):
            assert save(4 + number) == 3, "a rank's failure is every rank's"
        if ranks.is_reporter:
            assert checkpoints(root) == ["iter_0000002", "iter_0000003"]
            assert (root / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    if ranks.is_reporter:
        # A file at the path of the staging folder: the folder can neither be created nor removed.
        (root / ".iter_0000006.saving").write_text("")
    assert save(6) == 3
    if ranks.is_reporter:
        (root / ".iter_0000006.saving").unlink()
        (root / ".iter_0000001.saving").mkdir()
    assert save(6) == 6
    if ranks.is_reporter:
        # Folders left by an earlier job are removed, and only durable checkpoints count as
        # retained.
        assert checkpoints(root) == ["iter_0000003", "iter_0000006"]
        # The model did not change, so only the file with the iteration and the hashes differ.
        one, other = root / "iter_0000003", root / "iter_0000006"
        names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
        assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
        changed = {str(n) for n in names if (one / n).read_bytes() != (other / n).read_bytes()}
        assert changed == {"state.json", MANIFEST}, changed
    saver.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def damage(run: Any, root: Path, ranks: Ranks) -> None:
    """Resumes from randomly damaged checkpoints.

    Each attempt must end in a one-line user error that names the file. Damage that only
    ``--ckpt-verify`` detects may load cleanly without it. The outcome must be the same on every
    rank.
    """
    good, bad = root / "iter_0000002", root / "iter_0000009"
    names = [path.relative_to(good).as_posix() for path in _files(good)]
    # `choice` draws what all ranks have in common, `rng` the damage done by the first rank.
    choice, rng = random.Random(0), random.Random(1)
    is_first = ranks.process.rank == 0
    outside = sorted(path for path in root.parent.rglob("*") if good not in path.parents)
    counts = dict.fromkeys(("found", "refused", "without hashes", "loaded"), 0)
    cases = [(name, kind) for kind in DAMAGE for name in names]
    for number in range(max(NUM_MUTATIONS, len(cases))):
        # Damage every file in every way first, then draw at random.
        name, kind = cases[number] if number < len(cases) else choice.choice(cases)
        if is_first:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            DAMAGE[kind](bad / name, good, rng)
        torch.distributed.barrier()
        path = bad / name
        is_same = path.exists() and path.read_bytes() == (good / name).read_bytes()
        what = f"{kind} of {name}"
        if name == MANIFEST:
            # The list of hashes does not contain its own hash: damage to it is detected or has no
            # effect.
            _resume(run, bad, ranks, verify=True)
        elif not is_same:
            error = _resume(run, bad, ranks, verify=True)
            assert error is not None and name in error, f"{what}: {error}"
            counts["found"] += 1
        error = _resume(run, bad, ranks, verify=False)
        counts["loaded" if error is None else "refused"] += 1
        if not is_same and not name.endswith((".distcp", MANIFEST)):
            assert error is not None and name in error, f"{what}: {error}"
        elif error is not None:
            assert name in error, f"{what}: {error}"
        torch.distributed.barrier()
        # Without hashes, as an earlier version or another program would have saved it.
        if is_first:
            (bad / MANIFEST).unlink(missing_ok=True)
        torch.distributed.barrier()
        counts["without hashes"] += _resume(run, bad, ranks, verify=False) is not None
        torch.distributed.barrier()
    if is_first:
        shutil.rmtree(bad)
        assert outside == sorted(p for p in root.parent.rglob("*") if good not in p.parents)
        print(f"{len(cases)} kinds of damage or more: {counts}")
        assert counts["refused"] > NUM_MUTATIONS // 2 and counts["loaded"]


def _resume(run: Any, checkpoint: Path, ranks: Ranks, *, verify: bool) -> str | None:
    """Resumes as a run does. Returns the error message, which must be the same on every rank."""
    from megatron_chatflow.checkpoint.store import load_checkpoint, verify_checkpoint
    from megatron_chatflow.training.inputs import open_inputs

    settings = replace(run.config.checkpoint, load=str(checkpoint))
    error: str | None = None
    try:
        open_inputs(replace(run.config, checkpoint=settings))
        if verify:
            verify_checkpoint(checkpoint, ranks)
        optimization = run.optimization
        load_checkpoint(checkpoint, optimization.chunks, optimization.optimizer, ranks)
    except UserError as caught:
        error = str(caught)
        assert "\n" not in error, error
    errors: list[Any] = [None] * ranks.process.world_size
    torch.distributed.all_gather_object(errors, error is None)
    assert len(set(errors)) == 1, "ranks do not agree"
    return error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flip(path: Path, _: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _number in range(rng.choice((1, 1, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, _: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _zero(path: Path, _: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    begin = rng.randrange(len(content))
    length = min(rng.choice((16, 4096)), len(content) - begin)
    content[begin : begin + length] = bytes(length)
    path.write_bytes(content)


def _swap(path: Path, good: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice(_files(good)).read_bytes())


DAMAGE: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "flip": _flip,
    "cut": _cut,
    "zero": _zero,
    "swap": _swap,
    "removal": lambda path, *_: path.unlink(),
}


@contextlib.contextmanager
def nothing_gathered() -> Iterator[None]:
    """Fails if a rank gathers tensors or objects from other ranks inside the block."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a save gathers")

    names = ("gather", "all_gather", "all_gather_into_tensor", "gather_object", "all_gather_object")
    before = {name: getattr(torch.distributed, name) for name in names}
    for name in names:
        setattr(torch.distributed, name, refuse)
    yield
    for name, function in before.items():
        setattr(torch.distributed, name, function)


def resave(jobs: Path) -> None:
    """Loads a checkpoint in the layout of each job and saves it again without a training step."""
    for arguments in json.loads(jobs.read_text(encoding="utf-8")):
        config, _ = load_config_from_argv(arguments)
        ranks = initialize(
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
            num_model_chunks=num_model_chunks(config.model, config.parallel),
            context_parallel_size=config.parallel.context_parallel_size,
            seed=config.train.seed,
        )
        from megatron_chatflow.runtime.ranks import destroy_groups
        from megatron_chatflow.training.build import build_run
        from megatron_chatflow.training.loop import save

        with contextlib.ExitStack() as stack:
            run, progress = build_run(config, ranks, stack)
            assert progress.iteration == 4, "nothing was loaded"
            with nothing_gathered():
                save(run, progress)
            assert run.saver.finish() == 4
        destroy_groups()
        gc.collect()  # a group ends with its last reference
    finalize()


def main() -> None:
    what, arguments = sys.argv[1], sys.argv[2:]
    if what == "resave":
        return resave(Path(arguments[0]))
    config: RunConfig
    config, _ = load_config_from_argv(arguments)
    ranks = initialize(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        seed=config.train.seed,
    )
    from megatron_chatflow.training.build import build_run
    from megatron_chatflow.training.loop import train

    with contextlib.ExitStack() as stack:
        run, progress = build_run(config, ranks, stack)
        train(run, progress)
        assert config.checkpoint.save is not None
        {"failures": failures, "damage": damage}[what](run, Path(config.checkpoint.save), ranks)
    finalize()


if __name__ == "__main__":
    main()

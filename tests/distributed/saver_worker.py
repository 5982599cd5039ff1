"""Saves that fail, and damaged checkpoints, on real ranks.

``saver_worker.py failures|damage FLAGS...``: builds the run of the flags, as training does. Out: a
status of 0 if everything was as it has to be.
"""

import contextlib
import random
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chatflow.config import RunConfig, load_config_from_argv
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import finalize, initialize
from megatron_chatflow.runtime.ranks import Ranks

NUM_MUTATIONS = 120


@contextlib.contextmanager
def no_room(here: bool) -> Iterator[None]:
    """This process can write no file beyond 4 KiB, if it is meant."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def checkpoints(root: Path) -> list[str]:
    """Everything of saves that lies in the run's folder."""
    return sorted(path.name for path in root.iterdir() if "iter_" in path.name)


def failures(run: Any, root: Path, ranks: Ranks) -> None:
    """A save fails on one rank, on the other, before it begins; the next one succeeds."""
    saver, optimization = run.saver, run.optimization

    def save(iteration: int) -> int | None:
        state = replace(run.state, iteration=iteration, consumed_samples=8 * iteration)
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
        # A file where the staging folder goes: it cannot be made, nor removed as one.
        (root / ".iter_0000006.saving").write_text("")
    assert save(6) == 3
    if ranks.is_reporter:
        (root / ".iter_0000006.saving").unlink()
        (root / ".iter_0000001.saving").mkdir()
    assert save(6) == 6
    if ranks.is_reporter:
        # What an earlier job left is gone, and only what is durable counts as retained.
        assert checkpoints(root) == ["iter_0000003", "iter_0000006"]
    saver.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def damage(run: Any, root: Path, ranks: Ranks) -> None:
    """Loads checkpoints that are damaged at random: a user's error, or what was saved."""
    from megatron_chatflow.checkpoint.store import RunState, load_checkpoint, verify_checkpoint

    good = root / "iter_0000002"
    optimization = run.optimization
    names = sorted(path.name for path in good.iterdir())
    rng = random.Random(0)
    bad = root / "iter_0000009"
    outside = sorted(path for path in root.parent.rglob("*") if good not in path.parents)
    num_refused = num_found = 0
    for _ in range(NUM_MUTATIONS):
        shutil.copytree(good, bad)
        path = bad / rng.choice(names)
        content = bytearray(path.read_bytes())
        kind = rng.choice(("flip", "cut", "remove", "swap"))
        if kind == "remove":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(content[: rng.randrange(len(content))])
        elif kind == "swap":
            path.write_bytes((good / rng.choice(names)).read_bytes())
        else:
            for _ in range(rng.choice((1, 20))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        is_changed = not path.exists() or path.read_bytes() != (good / path.name).read_bytes()
        try:
            verify_checkpoint(bad, ranks)
            # The list of hashes is not itself in the list.
            assert not is_changed or path.name == "hashes.json"
        except UserError as error:
            assert path.name in str(error)
            num_found += 1
        try:
            RunState.read(bad)
            load_checkpoint(bad, optimization.chunks, optimization.optimizer, ranks)
        except UserError:
            num_refused += 1
        shutil.rmtree(bad)
    assert outside == sorted(path for path in root.parent.rglob("*") if good not in path.parents)
    print(f"{NUM_MUTATIONS} damaged checkpoints: {num_found} found by hash, {num_refused} refused")
    assert num_found > NUM_MUTATIONS // 2 and num_refused > NUM_MUTATIONS // 4


def main() -> None:
    what, arguments = sys.argv[1], sys.argv[2:]
    config: RunConfig
    config, _ = load_config_from_argv(arguments)
    ranks = initialize(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        seed=config.train.seed,
    )
    from megatron_chatflow.train.build import build_run
    from megatron_chatflow.train.loop import train

    with contextlib.ExitStack() as stack:
        run, progress = build_run(config, ranks, stack)
        train(run, progress)
        assert config.checkpoint.save is not None
        {"failures": failures, "damage": damage}[what](run, Path(config.checkpoint.save), ranks)
    finalize()


if __name__ == "__main__":
    main()

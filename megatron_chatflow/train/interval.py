"""Collects iterations and reports them: each by itself, and means over each log interval.

`IntervalLog.add` waits neither for a device nor for another rank, so an iteration that is not
logged costs nothing. What needs other ranks, the hash of each global batch, is exchanged for all
iterations at once, before a log, a validation or a save.

A log precedes every save. So a resumed run begins with an empty interval and logs the same means as
one that was never interrupted, and ``metrics.jsonl`` always reaches up to the last checkpoint.
"""

import time
from collections import deque
from collections.abc import Sequence

import torch

from megatron_chatflow.data.digest import combine_digests
from megatron_chatflow.runtime import megatron
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.train.hooks import Hook
from megatron_chatflow.train.report import IterationRecord, RunFacts, summarize
from megatron_chatflow.train.straggler import StragglerReport, Stragglers

RECENT_ITERATIONS = 100


class IntervalLog:
    """Iterations until they are reported, and the hooks that they are reported to.

    Attributes:
        hooks: Watchers; none but on the reporting rank.
    """

    def __init__(
        self, hooks: Sequence[Hook], facts: RunFacts, ranks: Ranks, stragglers: Stragglers | None
    ) -> None:
        """Starts with an empty interval.

        Args:
            hooks: Watchers; none but on the reporting rank.
            facts: What reports need to know of the run.
            ranks: This process's place.
            stragglers: Compares the ranks at each log; None where that is not asked for.
        """
        self.hooks = hooks
        self._facts = facts
        self._ranks = ranks
        self._stragglers = stragglers
        self._remaining = RemainingTime()
        self._records: list[IterationRecord] = []
        self._num_steps = 0
        self._data_seconds = 0.0
        # Of the iterations that the hooks have not seen: this rank's rows of sample and digest.
        self._digests: list[torch.Tensor] = []
        self._last_hash: str | None = None

    def add(
        self, digests: torch.Tensor, data_seconds: float, record: IterationRecord | None
    ) -> None:
        """Adds an iteration.

        Args:
            digests: int64[num_local_samples, 3], global sample number and digest of this rank's.
            data_seconds: This rank's wait for its batch.
            record: What is reported of it; None on ranks without hooks.
        """
        self._digests.append(digests)
        self._num_steps += 1
        self._data_seconds += data_seconds
        if record is not None:
            self._records.append(record)
            self._remaining.add(record.seconds, time.perf_counter())

    def write_iterations(self, stragglers: StragglerReport | None = None) -> None:
        """Hands the iterations since the last call to the hooks; every rank calls it.

        Args:
            stragglers: The ranks compared, reported with the last iteration.
        """
        if self._digests:
            hashes = batch_digests(self._digests, self._ranks)
            self._hand_on(hashes, stragglers)

    def log(self) -> None:
        """Reports the iterations since the last log and begins anew; every rank calls it."""
        if self._num_steps == 0:
            return
        stragglers = None
        if self._stragglers is not None:
            mean_wait = self._data_seconds / self._num_steps
            stragglers = self._stragglers.report(self._num_steps, mean_wait)
        self.write_iterations(stragglers)
        self._show(stragglers)

    def log_alone(self) -> None:
        """Reports what is pending when a failure ends the run, without other ranks or hashes."""
        if self._num_steps:
            self._hand_on([None] * len(self._digests), None)
            self._show(None)

    def _hand_on(self, hashes: Sequence[str | None], stragglers: StragglerReport | None) -> None:
        self._digests.clear()
        if not hashes or not self._records:
            return
        self._last_hash = hashes[-1]
        records = self._records[-len(hashes) :]
        reports = [
            summarize(
                [record],
                self._facts,
                batch_digest=digest,
                stragglers=stragglers if record is records[-1] else None,
            )
            for record, digest in zip(records, hashes, strict=True)
        ]
        for hook in self.hooks:
            hook.on_iterations(reports)

    def _show(self, stragglers: StragglerReport | None) -> None:
        if self._records:
            remaining = self._facts.num_iterations - self._records[-1].iteration
            report = summarize(
                self._records,
                self._facts,
                batch_digest=self._last_hash,
                stragglers=stragglers,
                seconds_left=self._remaining.estimate(remaining, time.perf_counter()),
            )
            for hook in self.hooks:
                hook.on_log(report)
        self._records = []
        self._num_steps = 0
        self._data_seconds = 0.0


class RemainingTime:
    """Estimates how long the rest of a run takes.

    The time of an iteration is the mean of the last `RECENT_ITERATIONS`. Validations and saves
    between iterations count by their share of the time since this process began to train.
    """

    def __init__(self) -> None:
        """Starts without any iteration."""
        self._begin = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_ITERATIONS)
        self._seconds = 0.0
        self._num_iterations = 0

    def add(self, seconds: float, now: float) -> None:
        """Adds an iteration that took ``seconds`` and ended at ``now``, by any clock."""
        if self._num_iterations == 0:
            self._begin = now - seconds
        elif self._num_iterations == 1:
            # The first iteration allocates and compiles; it counts only while it is the only one.
            self._recent.clear()
        self._num_iterations += 1
        self._seconds += seconds
        self._recent.append(seconds)

    def estimate(self, num_iterations: int, now: float) -> float:
        """Seconds that ``num_iterations`` more will take; at least one iteration was added."""
        between = max(now - self._begin - self._seconds, 0.0) / self._num_iterations
        return num_iterations * (sum(self._recent) / len(self._recent) + between)


def batch_digests(digests: Sequence[torch.Tensor], ranks: Ranks) -> list[str]:
    """Hashes whole global batches in sample order, with one exchange for all of them.

    Args:
        digests: For each iteration int64[num_local_samples, 3]: this rank's global sample numbers
            and digests. The data-parallel ranks hold equally many samples of each.
        ranks: This process's place.
    """
    local = torch.cat(list(digests)).to(ranks.device)
    parts = [torch.empty_like(local) for _ in range(ranks.data_parallel_size)]
    torch.distributed.all_gather(parts, local, group=megatron.data_parallel_group())
    sizes = [len(rows) for rows in digests]
    batches = zip(*(torch.split(part.cpu(), sizes) for part in parts), strict=True)
    return [_combine(torch.cat(batch)) for batch in batches]


def _combine(rows: torch.Tensor) -> str:
    return combine_digests(rows[rows[:, 0].argsort()][:, 1:])

"""The blend: turns a schedule into an exact sequence of draws.

For every global sample, `Blend.take` returns the source and the index of the sample within the
source. For every prefix of the sequence and every source, ``|count - sum of weights| < 1``, in
exact integers. The sequence depends only on the schedule and its recorded edits, and any part of it
can be computed without the parts before it.

A run consists of segments. Every schedule edit starts a new one (`megatron_chatflow.blend.edits`).
Each segment has an engine that draws its samples (`megatron_chatflow.blend.engine`). `Blend` joins
the segments and creates the state that is saved in every checkpoint.
"""

from __future__ import annotations

import operator
import threading
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_chatflow.blend.edits import FORMAT_VERSION, Edit, Segment, resume
from megatron_chatflow.blend.engine import ROOT_BITS, Engine, make_engine
from megatron_chatflow.blend.quota import GRID
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.errors import UserError

_Number = TypeVar("_Number", int, float)

MAX_SAMPLES = 1 << ROOT_BITS
"""A run has at most 2**40 samples."""


class Blend:
    """The sequence of draws of a run.

    Attributes:
        schedule: The current schedule.
        sources: Names of the sources, in the order of the numbers that `take` returns: first the
            sources of the schedule, then removed ones.
        edit: The edit that the current schedule makes to the recorded one; None if there is none.
    """

    def __init__(self, schedule: Schedule, state: Mapping[str, Any] | None = None):
        """Starts or resumes a run.

        Args:
            schedule: The schedule. In a resumed run, it may differ from the recorded schedule in
                samples that have not been drawn yet. Such an edit starts a segment.
            state: A state that `state_at` returned, possibly after a round trip through JSON; None
                for a new run.

        Raises:
            UserError: The schedule changes samples that were already drawn or removes a source in
                use, or the state is damaged.
        """
        self.schedule = schedule
        self.edit: Edit | None = None
        if state is None or state.get("position") == 0:
            zeros = (0,) * len(schedule.sources)
            self._segments = [Segment(0, 0, schedule, zeros, zeros, zeros)]
        else:
            self._segments, self.edit = resume(schedule, state)
        columns = self._segments[-1].schedule.sources
        removed = set(columns) - set(schedule.sources)
        self.sources = schedule.sources + tuple(name for name in columns if name in removed)
        number = {name: k for k, name in enumerate(self.sources)}
        self._public = np.array([number[name] for name in columns], np.int16)
        self._is_identity = columns == self.sources
        self._engines: dict[int, Engine] = {}
        # The loader may draw samples while another thread reads counts for a checkpoint.
        self._lock = threading.Lock()

    def take(self, begin: int, end: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Draws the samples ``[begin, end)``.

        Returns:
            ``(source, index)``: int16[end - begin], positions in `sources`, and
            int64[end - begin], the number of each sample within its source, from 0.

        Raises:
            UserError: The range is invalid.
        """
        begin, end = self._check(begin), self._check(end)
        if begin > end:
            raise UserError(f"take({begin}, {end}): the first sample must not be after the last")
        parts = []
        with self._lock:
            for number in range(self._segment_of(begin), len(self._segments)):
                stop = end
                if number + 1 < len(self._segments):
                    stop = min(end, self._segments[number + 1].begin)
                parts.append(self._engine(number).take(begin, stop))
                begin = stop
                if begin >= end:
                    break
        source, index = parts[0]
        if len(parts) > 1:
            source = np.concatenate([part[0] for part in parts])
            index = np.concatenate([part[1] for part in parts])
        return (source if self._is_identity else self._public[source]), index

    def counts(self, sample: int) -> npt.NDArray[np.int64]:
        """Returns the draws of each source before ``sample``, int64[num_sources].

        The counts are in the order of ``schedule.sources``, without removed sources.
        """
        counts = self._column_counts(self._check(sample))
        return np.array(self._of_schedule(counts.tolist()), np.int64)

    def quotas(self, sample: int) -> list[int]:
        """Returns the sums of the weights before ``sample``, in units of 2**-32 samples.

        The sums are in the order of `counts`, which approximates them.
        """
        sample = self._check(sample)
        return self._of_schedule(self._segments[self._segment_of(sample)].quotas_at(sample))

    @property
    def decided_samples(self) -> int:
        """Number of samples whose draws are known: all of them."""
        return MAX_SAMPLES

    def weights(self, sample: int) -> npt.NDArray[np.int64]:
        """Returns the weights of a sample in the current schedule; see `Schedule.weights`."""
        return self.schedule.weights(sample)

    def planned_shares(self, sample: int) -> npt.NDArray[np.float64]:
        """Returns the planned shares of ``schedule.sources`` at a sample, float64[num_sources]."""
        segment = self._segments[self._segment_of(self._check(sample))]
        shares = segment.schedule.weights_at(sample) / GRID
        return np.array(self._of_schedule(shares.tolist()))

    def position(self, sample: int) -> int:
        """Returns the position of a sample in the unit of the current schedule, rounded up.

        Positions are computed with the schedule of the segment that contains the sample.
        """
        number = self._segment_of(sample)
        if number + 1 == len(self._segments):
            return self.schedule.position(sample)
        return self._segments[number].schedule.position(sample, self.schedule.unit)

    def first_draw(self, source: int, index: int) -> int | None:
        """Returns the global sample of the ``index``-th draw of a source; None if it is >= 2**40.

        ``source`` is a position in `sources`.

        Raises:
            UserError: The source does not exist, or the index is negative.
        """
        if not 0 <= source < len(self.sources) or index < 0:
            raise UserError(f"first_draw({source}, {index}): no such source or index")
        if index >= MAX_SAMPLES:
            return None
        column = int(np.flatnonzero(self._public == source)[0])
        ends = [segment.counts[column] for segment in self._segments[1:]]
        with self._lock:
            sample = self._engine(bisect_right(ends, index)).find(column, index)
        return sample if 0 <= sample < MAX_SAMPLES else None

    def state_at(self, sample: int) -> dict[str, Any]:
        """Returns the JSON-compatible state after ``sample`` samples.

        Its size is O(num_sources) per segment.
        """
        sample = self._check(sample)
        counts = self._column_counts(sample)
        segments = self._segments[: self._segment_of(max(sample - 1, 0)) + 1]
        return {
            "format_version": FORMAT_VERSION,
            "position": sample,
            "sources": list(self.schedule.sources),
            "counts": [int(count) for count in counts],
            "segments": [segment.to_dict() for segment in segments],
        }

    def knots_before(self, sample: int) -> list[int]:
        """Returns the samples of all knots in (0, ``sample``), ascending.

        If the unit is iterations, a change of the batch size moves knots to other samples.
        """
        begins = [segment.begin for segment in self._segments]
        schedules = [*(segment.schedule for segment in self._segments[:-1]), self.schedule]
        found = {
            knot.at
            for begin, end, schedule in zip(begins, [*begins[1:], sample], schedules, strict=True)
            for knot in schedule.knots
            if max(begin, 1) <= knot.at < min(end, sample)
        }
        return sorted(found)

    def edits_before(self, sample: int) -> list[int]:
        """Returns the samples in (0, ``sample``) at which an edit took effect, ascending."""
        return [one.begin for one in self._segments[1:] if one.begin < sample]

    def error_bound(self) -> float:
        """Returns the exclusive bound of ``|count - quota|``, in samples; 1 without edits."""
        return float(self._segments[-1].error_bound)

    def _of_schedule(self, values: list[_Number]) -> list[_Number]:
        """Reorders values by segment column to the order of ``schedule.sources``."""
        result = list(values)
        for number, value in zip(self._public, values, strict=True):
            result[number] = value
        return result[: len(self.schedule.sources)]

    def _column_counts(self, sample: int) -> npt.NDArray[np.int64]:
        number = self._segment_of(sample)
        if sample == self._segments[number].begin:
            return np.array(self._segments[number].counts, np.int64)
        with self._lock:
            return self._engine(number).counts(sample)

    def _segment_of(self, sample: int) -> int:
        return bisect_right([segment.begin for segment in self._segments], sample) - 1

    def _engine(self, number: int) -> Engine:
        """Returns the engine of a segment. The two most recently used engines are cached."""
        engine = self._engines.pop(number, None)
        if engine is None:
            segment = self._segments[number]
            engine = make_engine(segment.table, segment.begin, segment.base, segment.counts)
        self._engines[number] = engine
        if len(self._engines) > 2:
            del self._engines[next(iter(self._engines))]
        return engine

    def _check(self, sample: int) -> int:
        sample = operator.index(sample)
        if not 0 <= sample <= MAX_SAMPLES:
            raise UserError(f"sample {sample}: must be between 0 and {MAX_SAMPLES}")
        return sample

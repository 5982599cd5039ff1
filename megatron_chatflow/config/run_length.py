"""The length of a run and the unit of its schedules.

With ``train_iters``, the end of the run, the learning rate and a data schedule in iterations are
measured in iterations. With ``train_samples``, all of them are measured in samples. The two units
differ only after a resume has changed the global batch size. Therefore never compute samples as
iterations times the current batch size: earlier iterations may have had another batch size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_chatflow.config.batch_ramp import BatchSizes
from megatron_chatflow.errors import UserError

if TYPE_CHECKING:
    from megatron_chatflow.config.sections import OptimizerConfig
    from megatron_chatflow.config.validation import RunConfig


@dataclass(frozen=True)
class RunLength:
    """The length of a run, computed when this process starts or resumes it."""

    counts_samples: bool  # whether `lr_warmup` and `lr_decay` are in samples instead of iterations
    iteration: int  # number of iterations completed before this process
    consumed_samples: int  # number of samples consumed before this process
    batch_sizes: BatchSizes  # number of samples per iteration from now on
    last_iteration: int
    # In the unit of the schedule, iterations or samples:
    lr_start: int  # where the schedule begins, 0 unless the run is in another cycle
    lr_warmup: int  # length of the learning rate's warmup
    lr_decay: int  # where the learning rate's decay ends
    lr_wsd_decay: int  # length of the decay at the end of a WSD schedule; 0 for other schedules
    end: int  # where the run ends

    @classmethod
    def of(
        cls,
        config: "RunConfig",
        iteration: int = 0,
        consumed_samples: int = 0,
        initial_batch_size: int | None = None,
    ) -> "RunLength":
        """Computes the length of a run from its configuration and progress.

        ``initial_batch_size`` is the global batch size at the start of the run, by default that of
        the configuration. With ``train_samples``, it converts iterations to samples.
        """
        train, optimizer = config.train, config.optimizer
        batch = train.global_batch_size
        sizes = BatchSizes.of(batch, train.rampup_batch_size)
        if train.train_iters is not None:
            last = train.train_iters
            end, unit = last, 1
        else:
            assert train.train_samples is not None, "one of the two is checked to be there"
            initial = initial_batch_size or batch
            # The last samples are not trained on if they do not fill a global batch.
            last = iteration + sizes.whole_iterations(consumed_samples, train.train_samples)
            unit, end = initial, train.train_samples
            if train.rampup_batch_size is None:
                end = end // initial * initial

        def length(name: str) -> int:
            samples = getattr(optimizer, f"lr_{name}_samples")
            return int(samples or (getattr(optimizer, f"lr_{name}_iters") or 0) * unit)

        return cls(
            counts_samples=train.train_iters is None,
            iteration=iteration,
            consumed_samples=consumed_samples,
            batch_sizes=sizes,
            last_iteration=last,
            lr_start=length("cycle_start"),
            lr_warmup=length("warmup"),
            lr_decay=length("decay") or end,
            lr_wsd_decay=length("wsd_decay"),
            end=end,
        )

    @property
    def num_samples(self) -> int:
        """Number of samples of the whole run."""
        return self.samples_after(self.remaining_iterations())

    def remaining_iterations(self) -> int:
        """Returns the number of iterations that this process runs."""
        return max(self.last_iteration - self.iteration, 0)

    def samples_after(self, num_iterations: int) -> int:
        """Returns the consumed samples after this process has run ``num_iterations``."""
        iterations = np.array([num_iterations], np.int64)
        return int(self.batch_sizes.samples_after(self.consumed_samples, iterations)[0])

    def iteration_of(self, sample: int) -> int:
        """Returns the iteration, counted from 1, that trains on a sample.

        The iteration of a sample before this process is not known; the result is then the last
        iteration before it.
        """
        if sample < self.consumed_samples:
            return self.iteration
        before = self.batch_sizes.whole_iterations(self.consumed_samples, sample)
        return self.iteration + before + 1

    def lr_position(self, iteration: int, consumed_samples: int) -> int:
        """Returns the position in the schedule of the learning rate, in the schedule's unit."""
        return (consumed_samples if self.counts_samples else iteration) - self.lr_start

    def check_learning_rate(self, optimizer: "OptimizerConfig") -> None:
        """Checks that the parts of the schedule follow each other, and that it has begun.

        Raises:
            UserError: They overlap, or a cycle begins after this process.
        """
        unit = "samples" if self.counts_samples else "iterations"
        place = self.consumed_samples if self.counts_samples else self.iteration
        if self.lr_start > place:
            raise UserError(
                f"optimizer.{self._field(optimizer, 'cycle_start')}: the cycle begins after "
                f"{self.lr_start} {unit}, and the run continues after {place}; resume with it from "
                "there, or remove it"
            )
        if 0 < self.lr_start >= self.lr_decay:
            raise UserError(
                f"optimizer.{self._field(optimizer, 'cycle_start')}: the cycle begins after "
                f"{self.lr_start} {unit}, and the decay ends at {self.lr_decay}; train longer, or "
                f"raise optimizer.lr_decay_{'samples' if self.counts_samples else 'iters'} if it "
                "is set"
            )
        if self.lr_start + self.lr_warmup >= self.lr_decay:
            raise UserError(
                f"optimizer.{self._shown(optimizer, 'warmup', self.lr_warmup)} is not below the "
                f"{self.lr_decay - self.lr_start} {unit} at which the decay ends; lower it"
            )
        most = self.lr_decay - self.lr_start - self.lr_warmup
        if self.lr_wsd_decay > most:
            raise UserError(
                f"optimizer.{self._shown(optimizer, 'wsd_decay', self.lr_wsd_decay)} is above the "
                f"{most} {unit} between the warmup and the end of the decay; lower it"
            )

    def _field(self, optimizer: "OptimizerConfig", name: str) -> str:
        has_samples = getattr(optimizer, f"lr_{name}_samples")
        return f"lr_{name}_samples" if has_samples else f"lr_{name}_iters"

    def _shown(self, optimizer: "OptimizerConfig", name: str, length: int) -> str:
        """Returns a length's field and value, and the value in the schedule's unit."""
        field = self._field(optimizer, name)
        given = getattr(optimizer, field)
        unit = "samples" if self.counts_samples else "iterations"
        return f"{field}: {given}" + ("" if given == length else f", which is {length} {unit},")

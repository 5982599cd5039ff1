"""The length of a run and the unit of its schedules.

With ``train_iters``, the end of the run, the learning rate and a data schedule in iterations are
measured in iterations. With ``train_samples``, all of them are measured in samples. The two units
differ only after a resume has changed the global batch size. Therefore never compute samples as
iterations times the current batch size: earlier iterations may have had another batch size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    global_batch_size: int  # number of samples per iteration from now on
    last_iteration: int
    lr_warmup: int  # length of the learning rate's warmup
    lr_decay: int  # position at which the learning rate's decay ends

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
        if train.train_iters is not None:
            last = train.train_iters
            warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_decay_iters or last
        else:
            assert train.train_samples is not None, "one of the two is checked to be there"
            initial = initial_batch_size or batch
            # The last samples are not trained on if they do not fill a global batch.
            last = iteration + max(train.train_samples - consumed_samples, 0) // batch
            warmup = optimizer.lr_warmup_samples or optimizer.lr_warmup_iters * initial
            decay = (
                optimizer.lr_decay_samples
                or (optimizer.lr_decay_iters or train.train_samples // initial) * initial
            )
        return cls(
            counts_samples=train.train_iters is None,
            iteration=iteration,
            consumed_samples=consumed_samples,
            global_batch_size=batch,
            last_iteration=last,
            lr_warmup=warmup,
            lr_decay=decay,
        )

    @property
    def num_samples(self) -> int:
        """Number of samples of the whole run."""
        return self.consumed_samples + self.remaining_iterations() * self.global_batch_size

    def remaining_iterations(self, iteration: int | None = None) -> int:
        """Returns the number of iterations after ``iteration`` (default: ``self.iteration``)."""
        return max(self.last_iteration - (self.iteration if iteration is None else iteration), 0)

    def lr_position(self, iteration: int, consumed_samples: int) -> int:
        """Returns the position in the learning rate's schedule, in the schedule's unit."""
        return consumed_samples if self.counts_samples else iteration

    def check_learning_rate(self, optimizer: "OptimizerConfig") -> None:
        """Checks that the warmup ends before the decay ends."""
        if self.lr_warmup < self.lr_decay:
            return
        field = "lr_warmup_samples" if optimizer.lr_warmup_samples else "lr_warmup_iters"
        given = getattr(optimizer, field)
        unit = "samples" if self.counts_samples else "iterations"
        shown = (
            str(given) if given == self.lr_warmup else f"{given}, which is {self.lr_warmup} {unit},"
        )
        raise UserError(
            f"optimizer.{field}: {shown} is not below the {self.lr_decay} {unit} at which the "
            "decay ends; lower it"
        )

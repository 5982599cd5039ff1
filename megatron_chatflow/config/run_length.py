"""How long a run is, and the unit in which its schedules count.

With ``train_iters`` the end of the run, the learning rate and a data schedule in iterations count
iterations; with ``train_samples`` all of them count samples. The two only differ once a resume has
changed the global batch size, which is why nothing here may be computed as iterations times the
present batch size: iterations before the change had other sizes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_chatflow.errors import UserError

if TYPE_CHECKING:
    from megatron_chatflow.config.sections import OptimizerConfig
    from megatron_chatflow.config.validation import RunConfig


@dataclass(frozen=True)
class RunLength:
    """Where a run ends, seen from the iteration at which this process takes it up.

    Attributes:
        counts_samples: Whether `lr_warmup` and `lr_decay` count samples; iterations otherwise.
        iteration: Steps taken so far.
        consumed_samples: Samples consumed so far.
        global_batch_size: Samples of every iteration to come.
        last_iteration: The iteration with which the run ends.
        lr_warmup: Length of the learning rate's warmup.
        lr_decay: Where the learning rate's decay ends.
    """

    counts_samples: bool
    iteration: int
    consumed_samples: int
    global_batch_size: int
    last_iteration: int
    lr_warmup: int
    lr_decay: int

    @classmethod
    def of(
        cls,
        config: "RunConfig",
        iteration: int = 0,
        consumed_samples: int = 0,
        initial_batch_size: int | None = None,
    ) -> "RunLength":
        """The length of a run that has come so far.

        Args:
            config: The run's.
            iteration: Steps taken.
            consumed_samples: Samples consumed.
            initial_batch_size: Global batch size that the run began with; the configuration's when
                left out. With ``train_samples``, settings in iterations are converted by it.
        """
        train, optimizer = config.train, config.optimizer
        batch = train.global_batch_size
        if train.train_iters is not None:
            last = train.train_iters
            warmup, decay = optimizer.lr_warmup_iters, optimizer.lr_decay_iters or last
        else:
            assert train.train_samples is not None, "one of the two is checked to be there"
            initial = initial_batch_size or batch
            # Samples that do not fill a global batch are not trained.
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
        """Samples of the whole run."""
        return self.consumed_samples + self.remaining_iterations() * self.global_batch_size

    def remaining_iterations(self, iteration: int | None = None) -> int:
        """Iterations that follow ``iteration``, or the one at which this process takes over."""
        return max(self.last_iteration - (self.iteration if iteration is None else iteration), 0)

    def lr_position(self, iteration: int, consumed_samples: int) -> int:
        """Where the learning rate's schedule stands after so many iterations and samples."""
        return consumed_samples if self.counts_samples else iteration

    def check_learning_rate(self, optimizer: "OptimizerConfig") -> None:
        """Checks that the warmup ends before the decay does.

        Raises:
            UserError: It does not.
        """
        if self.lr_warmup < self.lr_decay:
            return
        field = "lr_warmup_samples" if optimizer.lr_warmup_samples else "lr_warmup_iters"
        given = getattr(optimizer, field)
        unit = "samples" if self.counts_samples else "iterations"
        shown = (
            str(given) if given == self.lr_warmup else f"{given}, which is {self.lr_warmup} {unit},"
        )
        raise UserError(
            f"optimizer.{field}: {shown} is not below the {self.lr_decay} {unit} at whose end the "
            "decay is done; lower it"
        )

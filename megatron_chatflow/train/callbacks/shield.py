"""Keeps a run from its loggers: one that fails is logged and tried again with the next report.

In: how to make a hook. Out: the same hook, which no longer raises, not even while it is made.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.callbacks import Hook
from megatron_chatflow.train.report import IterationReport

logger = logging.getLogger(__name__)


class Shield:
    """A hook whose failures are logged, once until it works again.

    One that cannot even be made is tried again with every report.
    """

    def __init__(self, make: Callable[[], Hook]) -> None:
        """Makes the hook."""
        self._make = make
        self._hook: Hook | None = None
        self._name = "a logger"
        self._fails = False
        self._try(lambda hook: None)

    def on_iterations(self, reports: Sequence[IterationReport]) -> None:
        """Hands the iterations on."""
        self._try(lambda hook: hook.on_iterations(reports))

    def on_log(self, report: IterationReport) -> None:
        """Hands the report on."""
        self._try(lambda hook: hook.on_log(report))

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Hands the validation on."""
        self._try(lambda hook: hook.on_validation(iteration, losses))

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Hands the results on."""
        self._try(lambda hook: hook.on_choice(iteration, results))

    def close(self) -> None:
        """Closes the hook."""
        if self._hook is not None:
            self._try(lambda hook: hook.close())

    def _try(self, call: Callable[[Hook], None]) -> None:
        try:
            if self._hook is None:
                self._hook = self._make()
                self._name = type(self._hook).__name__
            call(self._hook)
        except Exception as error:
            if not self._fails:
                logger.warning("%s failed: %s; training goes on without it", self._name, error)
            self._fails = True
        else:
            if self._fails:
                logger.warning("%s works again", self._name)
            self._fails = False

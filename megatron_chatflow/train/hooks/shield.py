"""Keeps a run from its loggers: one that fails is logged and tried again with the next report.

In: a hook. Out: the same hook, which no longer raises.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.hooks import Hook
from megatron_chatflow.train.report import IterationReport

logger = logging.getLogger(__name__)


class Shield:
    """A hook whose failures are logged, once until it works again."""

    def __init__(self, hook: Hook) -> None:
        """Takes the hook."""
        self._hook = hook
        self._name = type(hook).__name__
        self._fails = False

    def on_iteration(self, report: IterationReport) -> None:
        """Hands the report on."""
        self._try(lambda: self._hook.on_iteration(report))

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Hands the validation on."""
        self._try(lambda: self._hook.on_validation(iteration, losses))

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Hands the results on."""
        self._try(lambda: self._hook.on_choice(iteration, results))

    def close(self) -> None:
        """Closes the hook."""
        self._try(self._hook.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._fails:
                logger.warning("%s failed: %s; training goes on without it", self._name, error)
            self._fails = True
        else:
            if self._fails:
                logger.warning("%s works again", self._name)
            self._fails = False

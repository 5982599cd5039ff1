"""Isolates training from a callback that fails."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.report import IterationReport

logger = logging.getLogger(__name__)


class IsolatedCallback(Callback):
    """Forwards reports to the callback that ``make`` creates, and logs its exceptions.

    A failure is logged once until the callback works again. If the callback cannot be created, its
    creation is tried again with the next report.
    """

    def __init__(self, make: Callable[[], Callback]) -> None:
        self._make = make
        self._callback: Callback | None = None
        self._name = "a logger"
        self._fails = False
        self._try(lambda callback: None)

    def on_iterations(self, reports: Sequence[IterationReport]) -> None:
        """Forwards the iterations."""
        self._try(lambda callback: callback.on_iterations(reports))

    def on_log(self, report: IterationReport) -> None:
        """Forwards the report."""
        self._try(lambda callback: callback.on_log(report))

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Forwards the validation losses."""
        self._try(lambda callback: callback.on_validation(iteration, losses))

    def on_decision(self, iteration: int, decision: Mapping[str, Any]) -> None:
        """Forwards the decision."""
        self._try(lambda callback: callback.on_decision(iteration, decision))

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Forwards the results."""
        self._try(lambda callback: callback.on_choice(iteration, results))

    def on_probes(
        self, iteration: int, results: Mapping[str, Mapping[str, float]], seconds: float
    ) -> None:
        """Forwards the numbers."""
        self._try(lambda callback: callback.on_probes(iteration, results, seconds))

    def on_upload(self, iteration: int, result: Mapping[str, Any]) -> None:
        """Forwards the outcome."""
        self._try(lambda callback: callback.on_upload(iteration, result))

    def close(self) -> None:
        """Closes the callback."""
        if self._callback is not None:
            self._try(lambda callback: callback.close())

    def _try(self, call: Callable[[Callback], None]) -> None:
        try:
            if self._callback is None:
                self._callback = self._make()
                self._name = type(self._callback).__name__
            call(self._callback)
        except Exception as error:
            if not self._fails:
                logger.warning("%s failed: %s; training continues without it", self._name, error)
            self._fails = True
        else:
            if self._fails:
                logger.warning("%s works again", self._name)
            self._fails = False

"""Evaluates multiple-choice questions during training."""

from megatron_chatflow.evaluation.choice import ChoiceValidator
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.loop import Run, TrainState, is_due, prepare_evaluation


class ChoiceEval(Callback):
    """Runs a `ChoiceValidator` at multiples of an interval, and before and after training.

    Without an interval it only evaluates before the first iteration.
    """

    def __init__(self, validator: ChoiceValidator, interval: int | None) -> None:
        self._validator = validator
        self._interval = interval

    def on_evaluate(self, run: Run, state: TrainState) -> None:
        """Evaluates if it is due, and reports the result to all callbacks."""
        is_start = state.iteration == 0
        if is_start or is_due(state.iteration, self._interval, run.length.last_iteration):
            self.run_choice_eval(run, state)

    def run_choice_eval(self, run: Run, state: TrainState) -> None:
        """Evaluates all questions; every rank calls it."""
        prepare_evaluation(run, state, "choice questions")
        result = self._validator.run(run.forward_step, run.optimization.chunks, run.ranks)
        for callback in run.callbacks:
            callback.on_choice(state.iteration, {self._validator.name: result})

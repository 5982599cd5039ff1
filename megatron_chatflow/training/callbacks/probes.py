"""Evaluates probes of transfer during training."""

import time
from collections.abc import Sequence

from megatron_chatflow.evaluation.probes import PreparedProbe
from megatron_chatflow.evaluation.scoring import PackedRows
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.loop import Run, TrainState, is_due, prepare_evaluation


class ProbeEval(Callback):
    """Evaluates probes at multiples of an interval, and before and after training.

    The probes were drawn and encoded when the run started, from their own seeds, so they change no
    random state and are the same after a resume.
    """

    def __init__(
        self, probes: Sequence[PreparedProbe], packed: Sequence[PackedRows], interval: int | None
    ) -> None:
        self._probes = list(zip(probes, packed, strict=True))
        self._interval = interval

    def on_evaluate(self, run: Run, state: TrainState) -> None:
        """Evaluates if it is due, and reports the numbers to all callbacks."""
        is_start = state.iteration == 0
        if not is_start and not is_due(state.iteration, self._interval, run.length.last_iteration):
            return
        begin = time.perf_counter()
        prepare_evaluation(run, state, "probes")
        chunks = run.optimization.chunks
        results = {
            probe.label: probe.summarize(packed.log_probs(run.forward_step, chunks, run.ranks))
            for probe, packed in self._probes
        }
        seconds = time.perf_counter() - begin
        for callback in run.callbacks:
            callback.on_probes(state.iteration, results, seconds)

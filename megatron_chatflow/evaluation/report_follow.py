"""Follows running runs: the page is written anew as long as one of them goes on.

In: run folders, one of which may not have logged anything yet. Out: a page that loads itself anew,
and in the end one that no longer does.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.report import write_page
from megatron_chatflow.evaluation.report_data import RunMetrics, RunReader
from megatron_chatflow.evaluation.report_tables import progress


def follow_runs(
    folders: Sequence[Path],
    output: Path,
    interval: float,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> list[RunMetrics]:
    """Writes the page every ``interval`` seconds until every run is finished.

    Args:
        folders: Run folders; those without a logged iteration are waited for.
        output: The page.
        interval: Seconds between two pages.
        say: Told what is waited for, and of each new iteration.
        sleep: Waits; Ctrl-C ends it and the following.

    Returns:
        What was read last.

    Raises:
        UserError: A page cannot be written, or nothing can be read when Ctrl-C ends the waiting.
    """
    readers = [RunReader(folder) for folder in folders]
    runs: list[RunMetrics] = []
    shown = ""
    try:
        while True:
            try:
                runs = [reader.read() for reader in readers]
                is_over = all((progress(run) or 0.0) >= 1 for run in runs)
                write_page(runs, output, None if is_over else interval)
                state = ", ".join(f"{run.name}: iteration {_last(run):,}" for run in runs)
                if is_over:
                    return runs
            except UserError as error:
                if runs:
                    raise
                state = f"waiting: {error}"
            if state != shown:
                say(state)
            shown = state
            sleep(interval)
    except KeyboardInterrupt:
        runs = [reader.read() for reader in readers]
        write_page(runs, output)
        return runs


def _last(run: RunMetrics) -> int:
    known = run.iteration if len(run.iteration) else run.validation_iteration
    return int(known[-1])

"""The entry point with an injected fault that a healthy machine would not show.

``faulty_worker.py FAULT pretrain-arguments...``, where FAULT is a JSON object:

- ``{"nan": [3, 4]}``: the loss of these iterations (counted from 1) is NaN.
- ``{"nan_at": [16, 28]}``: the loss of the iterations that begin at these samples is NaN.
- ``{"spike": {"7": 100}}``: the loss of iteration 7 is multiplied by 100.
- ``{"slow": {"rank": 1, "seconds": 0.2}}``: each forward pass of the rank takes longer by this.
- ``{"hang": {"rank": 1, "iteration": 3}}``: the rank sleeps forever before the step of the
  iteration, unless the job has already been restarted.
- ``{"mistake": {"rank": 1, "iteration": 3}}``: the rank raises a `LocalError` at the iteration.
- ``{"slow_save": {"rank": 1, "seconds": 3}}``: each checkpoint file of the rank takes longer by
  this.
- ``{"kill": {"rank": 1, "iteration": 3}}``: the rank is killed at the iteration.

Faults are injected into the forward step or before it. The code that handles them is the package's
own.
"""

import json
import os
import signal
import sys
import time
from typing import Any

from megatron_chatflow.errors import LocalError, run_main
from megatron_chatflow.pretrain import main

FAULT = json.loads(sys.argv.pop(1))


def plant() -> None:
    """Injects the faults. Call it after megatron-core may be imported."""
    from megatron_chatflow.training import loop

    step = loop.train_step

    def faulty_step(batch: Any, optimization: Any, forward_step: Any, *rest: Any) -> Any:
        iteration = batch.end // (batch.end - batch.begin)
        is_nan = iteration in FAULT.get("nan", ()) or batch.begin in FAULT.get("nan_at", ())
        factor = float("nan") if is_nan else 1.0
        factor = FAULT.get("spike", {}).get(str(iteration), factor)
        hang = FAULT.get("hang")
        is_first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if hang and hang["iteration"] == iteration and is_first_attempt:
            while int(os.environ["RANK"]) == hang["rank"]:
                time.sleep(1)

        _end_this_rank(iteration)

        class Scaled:
            """Wraps the forward step and scales its losses."""

            def __call__(self, *arguments: Any) -> Any:
                slow = FAULT.get("slow")
                if slow and int(os.environ["RANK"]) == slow["rank"]:
                    time.sleep(slow["seconds"])
                output, loss_function = forward_step(*arguments)
                if factor == 1.0:
                    return output, loss_function

                def scaled(tensor: Any) -> Any:
                    loss, num_tokens, sums = loss_function(tensor)
                    sums = sums.clone()
                    sums[:, 0] *= factor
                    return loss * factor, num_tokens, sums

                return output, scaled

            def __getattr__(self, name: str) -> Any:
                return getattr(forward_step, name)

        return step(batch, optimization, Scaled(), *rest)

    loop.train_step = faulty_step
    slow = FAULT.get("slow_save")
    if slow and int(os.environ["RANK"]) == slow["rank"]:
        from megatron_chatflow.checkpoint import store as saver

        write = saver._write_whole

        def write_late(*arguments: Any) -> Any:
            time.sleep(slow["seconds"])
            return write(*arguments)

        saver._write_whole = write_late


def _end_this_rank(iteration: int) -> None:
    here = {"rank": int(os.environ.get("RANK", "0")), "iteration": iteration}
    if FAULT.get("mistake") == here:
        raise LocalError("data.sources.first: made up")
    if FAULT.get("kill") == here:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from megatron_chatflow import pretrain

    train = pretrain.run_training

    def with_faults(config: Any, ranks: Any) -> None:
        plant()
        train(config, ranks)

    pretrain.run_training = with_faults
    run_main(main)

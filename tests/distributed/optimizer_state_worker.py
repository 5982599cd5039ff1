"""Writes how many bytes a rank's optimizer holds.

``optimizer_state_worker.py FOLDER JOBS.json``, where the file holds a list of command lines.
"""

import contextlib
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint.state import local_states
from megatron_chatflow.config import load_config_from_argv
from megatron_chatflow.runtime.launch import finalize, initialize


def main() -> None:
    folder, jobs = map(Path, sys.argv[1:])
    for number, arguments in enumerate(json.loads(jobs.read_text(encoding="utf-8"))):
        config, _ = load_config_from_argv(arguments)
        ranks = initialize(seed=config.train.seed)
        from megatron_chatflow.runtime.ranks import destroy_groups
        from megatron_chatflow.training.build import build_run

        with contextlib.ExitStack() as stack:
            run, _ = build_run(config, ranks, stack)
            file = folder / f"{number}_rank_{ranks.process.rank}"
            file.write_text(str(_num_bytes(run.optimization)))
        destroy_groups()
        gc.collect()  # a group ends with its last reference
    finalize()


def _num_bytes(optimization: Any) -> int:
    local_states(optimization.optimizer)  # creates the moments
    parameters = [one for chunk in optimization.chunks for one in chunk.parameters()]
    weights = {one.untyped_storage().data_ptr() for one in parameters}
    held: dict[int, int] = {}
    for part in optimization.optimizer.chained_optimizers:
        inner = part.optimizer
        tensors: list[torch.Tensor] = [
            one for group in inner.param_groups for one in group["params"]
        ]
        tensors += [one for state in inner.state.values() for one in state.values()]
        for tensor in tensors:
            address = tensor.untyped_storage().data_ptr()
            if address not in weights:
                held[address] = tensor.numel() * tensor.element_size()
    return sum(held.values())


if __name__ == "__main__":
    main()

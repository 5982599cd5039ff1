"""Runs several configurations in turn in the same processes.

``torchrun --nproc-per-node N worker.py JOBS.json``, where the file holds a list of command lines.
Starting a process takes seconds and a tiny run a fraction of a second, so layouts share processes.
Each run creates its own parallel groups, model, optimizer and loader.
"""

import gc
import json
import sys
import warnings
from pathlib import Path

from megatron_chatflow.config import load_config_from_argv, validate_for_world
from megatron_chatflow.config.shape import num_model_chunks
from megatron_chatflow.pretrain import run_training
from megatron_chatflow.runtime.launch import finalize, initialize
from megatron_chatflow.runtime.ranks import ProcessRank


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        config, _ = load_config_from_argv(arguments)
        validate_for_world(config, ProcessRank.from_environment().world_size)
        ranks = initialize(
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
            num_model_chunks=num_model_chunks(config.model, config.parallel),
            context_parallel_size=config.parallel.context_parallel_size,
            seed=config.train.seed,
        )
        run_training(config, ranks)
        # The process group stays. Only megatron-core's groups are created anew.
        from megatron_chatflow.runtime.ranks import destroy_groups

        destroy_groups()
        gc.collect()  # a group ends with its last reference
    finalize()


if __name__ == "__main__":
    main()

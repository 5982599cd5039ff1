"""Entry point of training: parses the command line, joins the job and trains.

``torchrun --nproc-per-node N -m megatron_chatflow.pretrain --config run.yaml [flags]``

The run's folder receives checkpoints, metrics and TensorBoard events.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import logging
import sys
import warnings
from contextlib import ExitStack
from datetime import timedelta
from functools import partial

from megatron_chatflow.config import RunConfig, load_config_from_argv, validate_for_world
from megatron_chatflow.config.flags import RunOptions
from megatron_chatflow.config.shape import num_model_chunks
from megatron_chatflow.config.validation import REMOVED
from megatron_chatflow.errors import run_main
from megatron_chatflow.runtime.exit_reporter import ExitReporter
from megatron_chatflow.runtime.launch import finalize, initialize, use_deterministic_algorithms
from megatron_chatflow.runtime.ranks import ProcessRank, Ranks, run_on_all_ranks
from megatron_chatflow.training.remote_inputs import fetch_inputs

logger = logging.getLogger("megatron_chatflow")


def main() -> int:
    """Runs the command line and returns the exit status."""
    process = ProcessRank.from_environment()
    exit_reporter = ExitReporter(process)
    try:
        _run(process)
    except Exception as error:
        if not exit_reporter.report(error):
            raise
        return 2
    finally:
        finalize()
        exit_reporter.wait()
    return 0


def _run(process: ProcessRank) -> None:
    config, options = load_config_from_argv(sys.argv[1:])
    logging.basicConfig(
        level=logging.INFO if process.rank == 0 else logging.ERROR,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    # megatron-core warns about each missing GPU package; `build_run` logs what is used instead.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # megatron-core logs every configuration object; the resolved configuration is logged below.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    for note in options.notes:
        logger.info("Megatron-LM's %s", note)
    for path in options.removed:
        logger.warning("%s: was removed and has no effect: %s", path, REMOVED[path])
    if options.dry_run:
        _dry_run(config, options)
        return
    _initialize_and_train(config)


def _dry_run(config: RunConfig, options: RunOptions) -> None:
    # Nothing that trains may import `simulate`.
    from megatron_chatflow.simulate.inputs import missing_files
    from megatron_chatflow.simulate.layout_search import describe_step
    from megatron_chatflow.training.dry_run import dry_run

    if not options.simulate:
        fetch_inputs(config, is_dry_run=True)
    # A simulation needs neither data nor weights; the plain dry run does.
    if not options.simulate or not missing_files(config):
        print(
            dry_run(
                config,
                options.world_size,
                verbose=options.verbose,
                describe_step=partial(describe_step, gpu_name=options.gpu),
            )
        )
    if not options.simulate:
        return
    from megatron_chatflow.simulate.run import simulate

    print(
        simulate(
            config,
            gpu=options.gpu,
            world_size=options.world_size,
            ranks=options.rank,
            output=options.output,
        )
    )


def train(config: RunConfig) -> None:
    """Trains one run on this process, as ``python -m megatron_chatflow.pretrain`` does.

    Every process that ``torchrun`` started calls it with the same configuration; without
    ``torchrun``, this process trains alone. A run whose ``checkpoint.load`` holds a checkpoint
    continues from it. `logging` is left as the caller configured it.

    Args:
        config: The configuration of the run, from `load_config`.

    Raises:
        UserError: The configuration does not suit the number of processes, or an input is invalid.
    """
    try:
        _initialize_and_train(config)
    finally:
        finalize()


def _initialize_and_train(config: RunConfig) -> None:
    run_training(config, initialize_run(config))


def initialize_run(config: RunConfig) -> Ranks:
    """Joins the job of a run on this process; `finalize` leaves it.

    Raises:
        UserError: The configuration does not suit the number of processes, or an input is missing.
    """
    process = ProcessRank.from_environment()
    validate_for_world(config, process.world_size)
    fetch_inputs(config, rank=process.rank, local_rank=process.local_rank)
    parallel = config.parallel
    if config.train.deterministic_mode:
        use_deterministic_algorithms()
    ranks = initialize(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        num_model_chunks=num_model_chunks(config.model, parallel),
        context_parallel_size=parallel.context_parallel_size,
        seed=config.train.seed,
        timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
    )
    run_on_all_ranks(lambda: None)  # no rank may read what others still copy
    if ranks.is_reporter:
        logger.info("resolved configuration:\n%s", config.to_yaml())
    return ranks


def run_training(config: RunConfig, ranks: Ranks) -> None:
    """Builds the run on this rank, resumes it if there is a checkpoint, and trains it."""
    # These import megatron-core, which must come after `initialize` on CPUs.
    from megatron_chatflow.training.build import build_run
    from megatron_chatflow.training.loop import train

    with ExitStack() as stack:
        run, state = build_run(config, ranks, stack)
        state = train(run, state)
    if ranks.is_reporter:
        logger.info("done at iteration %d, %d samples", state.iteration, state.consumed_samples)


if __name__ == "__main__":
    run_main(main)

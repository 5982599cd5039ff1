"""Makes the parts of a job on a Ray cluster.

In: the address of a cluster, and the job. Out: every part's datasets, in the folder that all
machines share, as `run_part` makes them here.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megatron_chatflow.corpus.inputs import InputFile
from megatron_chatflow.data.preprocess.settings import PreprocessSettings
from megatron_chatflow.errors import UserError

logger = logging.getLogger(__name__)
Contents = dict[str, dict[str, Any]]
MakePart = Callable[[PreprocessSettings, Sequence[InputFile]], Contents]


def on_cluster(settings: PreprocessSettings, files: Sequence[InputFile]) -> PreprocessSettings:
    """The job with paths that hold on every machine, and as many parts as a cluster can use.

    Without `num_partitions` there are as many parts as files, up to one for 4 GiB or 256: they do
    not depend on the cluster, so that a killed job goes on elsewhere.
    """
    num_parts = settings.num_partitions
    if num_parts == 1:
        num_bytes = sum(file.num_bytes for file in files)
        num_parts = max(1, min(len(files), max(256, num_bytes >> 32)))
    return replace(
        settings,
        output_prefix=os.path.abspath(settings.output_prefix),
        tokenizer_model=os.path.abspath(settings.tokenizer_model),
        num_partitions=num_parts,
    )


def make_parts(
    settings: PreprocessSettings, files: Sequence[InputFile], make_part: MakePart
) -> list[Contents]:
    """Makes every part of a job, each in a task of its own.

    Args:
        settings: The job; `num_workers` is for each part, and what a task asks of the cluster.
        files: The job's inputs, which every machine finds under the same absolute paths.
        make_part: Makes the part that the settings' shard names, unless it is there already.

    Returns:
        The parts' sidecars, in order.

    Raises:
        UserError: Ray or the cluster is not there, or a part fails; the others are given up, those
            that are finished stay.
    """
    assert settings.ray is not None
    with _connected(settings.ray) as ray:
        most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes()), default=0)
        if settings.num_workers > most:
            raise UserError(
                f"--workers {settings.num_workers}: of each part, and no machine of the cluster "
                f"has more than {most} CPUs"
            )
        task = ray.remote(num_cpus=settings.num_workers, max_retries=2)(_made)
        count = settings.num_partitions
        shards = [replace(settings, shard=(number, count)) for number in range(count)]
        everywhere = [replace(file, path=file.path and file.path.absolute()) for file in files]
        references = [task.remote(make_part, shard, everywhere) for shard in shards]
        numbers = {reference: number for number, reference in enumerate(references)}
        contents: list[Contents] = [{} for _ in references]
        waiting = references
        while waiting:
            (done, *_), waiting = ray.wait(waiting, num_returns=1)
            number = numbers[done]
            try:
                made = ray.get(done)
            except ray.exceptions.RayError as error:
                _give_up(ray, waiting)
                raise UserError(
                    f"part {number} of {count} failed on the cluster: {error}"
                ) from error
            if isinstance(made, UserError):
                _give_up(ray, waiting)
                raise made
            contents[number] = made
            logger.info("%d of %d parts are there", count - len(waiting), count)
    return contents


def _made(
    make_part: MakePart, settings: PreprocessSettings, files: list[InputFile]
) -> Contents | UserError:
    """A part; an error of the user's comes back as a value, with its message as it is."""
    try:
        return make_part(settings, files)
    except UserError as error:
        return error


def _give_up(ray: Any, references: Sequence[Any]) -> None:
    for reference in references:
        ray.cancel(reference, force=True)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, joined to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing phones home
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs ray: pip install ray") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"--ray {address}: no cluster there: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()

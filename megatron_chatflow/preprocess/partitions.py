"""Splits a preprocessing job into partitions that are built independently and then merged.

A partition is a consecutive run of the job's input files, so merging all partitions in order gives
the same bytes as the undivided job. Partitions serve three purposes: job arrays (`--shard I/N`
builds one), restarts (`--partitions N` continues after the last finished partition), and Ray
clusters (`--ray`; every machine must see the inputs and outputs at the same paths).

A partition is finished once its files have their final names. Before a finished partition is
reused, its sidecar is compared with the job's settings and its files with the recorded hashes.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_chatflow.data.indexed import bin_path, idx_path
from megatron_chatflow.data.sidecar import (
    hashes_path,
    loss_mask_prefix,
    read_sidecar,
    settings_of,
    sha256_of,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import remove_file
from megatron_chatflow.preprocess.merge import PartitionPolicy, merge_datasets
from megatron_chatflow.preprocess.output import document_prefix, output_paths
from megatron_chatflow.preprocess.readers import InputFile
from megatron_chatflow.preprocess.settings import PreprocessSettings

logger = logging.getLogger(__name__)
Contents = dict[str, dict[str, Any]]
"""Sidecars by output key."""
MakePartition = Callable[[PreprocessSettings, Sequence[InputFile]], Contents]
Job = Callable[[PreprocessSettings, Sequence[InputFile], int], Contents]


def with_cluster_defaults(
    settings: PreprocessSettings, files: Sequence[InputFile]
) -> PreprocessSettings:
    """Returns the job with absolute paths and enough partitions to occupy a cluster.

    If `num_partitions` is 1, it is set to the number of files, limited to the larger of 256 and one
    per 4 GiB of input. The number does not depend on the cluster, so that a killed job can continue
    on another one.
    """
    num_partitions = settings.num_partitions
    if num_partitions == 1:
        num_bytes = sum(file.num_bytes for file in files)
        num_partitions = max(1, min(len(files), max(256, num_bytes >> 32)))
    return replace(
        settings,
        output_prefix=os.path.abspath(settings.output_prefix),
        tokenizer_model=os.path.abspath(settings.tokenizer_model),
        num_partitions=num_partitions,
    )


def make_partitions(
    settings: PreprocessSettings, files: Sequence[InputFile], make_partition: MakePartition
) -> list[Contents]:
    """Builds every partition of a job in one Ray task each.

    Args:
        settings: The settings of the job. Every task requests `num_workers` CPUs.
        files: The job's inputs, at the same absolute paths on every machine.
        make_partition: Builds the partition selected by `settings.shard` if it does not exist yet.

    Returns:
        The partitions' sidecars, in order.

    Raises:
        UserError: Ray or the cluster is not available, or a partition failed. In the latter case,
            unfinished partitions are cancelled and finished ones are kept.
    """
    assert settings.ray is not None
    with _ray_session(settings.ray) as ray:
        max_cpus = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes()), default=0)
        if settings.num_workers > max_cpus:
            raise UserError(
                f"--workers {settings.num_workers}: a partition needs that many CPUs, and the "
                f"largest machine of the cluster has {max_cpus}; use fewer workers"
            )
        task = ray.remote(num_cpus=settings.num_workers, max_retries=2)(_run_task)
        count = settings.num_partitions
        shards = [replace(settings, shard=(number, count)) for number in range(count)]
        everywhere = [replace(file, path=file.path and file.path.absolute()) for file in files]
        references = [task.remote(make_partition, shard, everywhere) for shard in shards]
        numbers = {reference: number for number, reference in enumerate(references)}
        contents: list[Contents] = [{} for _ in references]
        waiting = references
        while waiting:
            (done, *_), waiting = ray.wait(waiting, num_returns=1)
            number = numbers[done]
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                _cancel(ray, waiting)
                raise UserError(
                    f"partition {number} of {count} failed on the cluster: {error}"
                ) from error
            if isinstance(result, UserError):
                _cancel(ray, waiting)
                raise result
            contents[number] = result
            logger.info("%d of %d partitions are finished", count - len(waiting), count)
    return contents


def _run_task(
    make_partition: MakePartition, settings: PreprocessSettings, files: list[InputFile]
) -> Contents | UserError:
    """Builds a partition in a Ray task. Returns a `UserError`, because Ray wraps raised errors."""
    try:
        return make_partition(settings, files)
    except UserError as error:
        return error


def _cancel(ray: Any, references: Sequence[Any]) -> None:
    for reference in references:
        ray.cancel(reference, force=True)


@contextmanager
def _ray_session(address: str) -> Iterator[Any]:
    """Connects to a Ray cluster and yields the ``ray`` module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs ray: pip install ray") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"--ray {address}: cannot connect to a cluster: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def parse_shard(text: str) -> tuple[int, int]:
    """Parses a shard's index and count from text such as ``3/16``.

    Raises:
        ValueError: The text is not two integers separated by a slash.
    """
    number, count = text.split("/")
    return int(number), int(count)


def split_files(files: Sequence[InputFile], num_partitions: int) -> list[list[InputFile]]:
    """Splits the files into consecutive runs of similar size in bytes. Runs may be empty."""
    partitions: list[list[InputFile]] = [[] for _ in range(num_partitions)]
    total = sum(file.num_bytes for file in files)
    num_before = 0
    for file in files:
        middle = num_before + file.num_bytes / 2
        partitions[min(int(middle * num_partitions / max(total, 1)), num_partitions - 1)].append(
            file
        )
        num_before += file.num_bytes
    return partitions


def partition_prefix(output_prefix: str, number: int, num_partitions: int) -> str:
    """Returns the output prefix of a partition."""
    return f"{output_prefix}_part{number:05d}of{num_partitions:05d}"


def run_partition(
    settings: PreprocessSettings, files: Sequence[InputFile], job: Job, num_bad_before: int = 0
) -> Contents:
    """Builds the partition selected by `settings.shard` if it is not finished yet.

    Args:
        settings: The settings of the whole job.
        files: The inputs of the whole job.
        job: A function that builds the datasets of some files. A dataset may be empty.
        num_bad_before: Number of bad lines in earlier partitions. They count towards
            `max_bad_lines`.

    Returns:
        The sidecar of each output key.

    Raises:
        UserError: Other data exists at the partition's paths, or `job` failed.
    """
    assert settings.shard is not None
    number, num_partitions = settings.shard
    _check_divisible(files)
    prefix = partition_prefix(settings.output_prefix, number, num_partitions)
    partition_settings = replace(settings, output_prefix=prefix)
    partition_files = split_files(files, num_partitions)[number]
    contents = {
        key: _finished(partition_settings, partition_files, key)
        for key in settings.corpus.json_keys
    }
    found = {key: content for key, content in contents.items() if content is not None}
    if len(found) == len(contents):
        logger.info("partition %d of %d is finished: %s", number, num_partitions, prefix)
        return found
    overwrite = settings.overwrite or bool(found)
    return job(replace(partition_settings, overwrite=overwrite), partition_files, num_bad_before)


def run_all_partitions(
    settings: PreprocessSettings, files: Sequence[InputFile], job: Job
) -> Contents:
    """Builds the missing partitions here or on a cluster, merges all and removes them.

    Args:
        settings: The settings of the whole job.
        files: The inputs of the whole job.
        job: See `run_partition`.

    Returns:
        The sidecar of each output key.

    Raises:
        UserError: `run_partition` or `merge_datasets` failed, or no document is left.
    """
    _check_divisible(files)
    merged = {key: merged_already(settings, files, key) for key in settings.corpus.json_keys}
    contents = {key: content for key, content in merged.items() if content is not None}
    if len(contents) < len(merged):
        _make_missing_partitions(settings, files, job, set(merged) - set(contents))
        policy = PartitionPolicy(
            max_bad_lines=settings.max_bad_lines, max_dropped_share=settings.max_dropped_share
        )
        for key in settings.corpus.json_keys:
            if key not in contents:
                prefix = document_prefix(settings.output_prefix, key)
                partitions = [
                    document_prefix(partition, key) for partition in _partition_prefixes(settings)
                ]
                merge_datasets(partitions, prefix, overwrite=True, policy=policy)
                contents[key] = read_sidecar(prefix) or {}
    for path in _partition_files(settings):
        remove_file(path)
    return {key: contents[key] for key in settings.corpus.json_keys}


def _make_missing_partitions(
    settings: PreprocessSettings, files: Sequence[InputFile], job: Job, keys: set[str]
) -> None:
    """Builds the missing partitions.

    Raises:
        UserError: No partition has a document for one of ``keys``.
    """
    count = settings.num_partitions
    partitions: list[Contents] = []
    if settings.ray is not None:
        partitions = make_partitions(settings, files, partial(run_partition, job=job))
    else:
        num_bad = 0
        for number in range(count):
            partition = replace(settings, shard=(number, count))
            partitions.append(run_partition(partition, files, job, num_bad))
            num_bad += max(content["num_bad_lines"] for content in partitions[-1].values())
    for key in settings.corpus.json_keys:
        if key in keys and not any(partition[key]["num_documents"] for partition in partitions):
            raise UserError(f"no document left: {document_prefix(settings.output_prefix, key)}")


def merged_already(
    settings: PreprocessSettings, files: Sequence[InputFile], key: str
) -> dict[str, Any] | None:
    """Returns the merged sidecar of a key if an equal job was killed after merging it, else None.

    Args:
        settings: The settings of the whole job.
        files: The inputs of the whole job.
        key: The output key.
    """
    if not any(path.exists() for path in _partition_files(settings)):
        return None
    try:
        return _finished(replace(settings, overwrite=False), files, key)
    except UserError:  # other data, which the caller handles
        return None


def _partition_prefixes(settings: PreprocessSettings) -> list[str]:
    count = settings.num_partitions
    return [partition_prefix(settings.output_prefix, number, count) for number in range(count)]


def _partition_files(settings: PreprocessSettings) -> Iterator[Path]:
    """Yields every path that an output of a partition may have, for all keys."""
    for partition in _partition_prefixes(settings):
        for key in settings.corpus.json_keys:
            yield from output_paths(partition, key)


def _check_divisible(files: Sequence[InputFile]) -> None:
    for file in files:
        if file.path is None or not file.path.is_file():
            raise UserError(
                f"cannot be split into partitions: {file.name}: use files, folders or globs as "
                "the input"
            )


def _finished(
    settings: PreprocessSettings, files: Sequence[InputFile], key: str
) -> dict[str, Any] | None:
    """Returns the sidecar of a finished, undamaged dataset of this job; None if there is none."""
    prefix = document_prefix(settings.output_prefix, key)
    if not idx_path(prefix).exists():
        return None
    content = read_sidecar(prefix)
    inputs = [{"name": file.name, "num_bytes": file.num_bytes} for file in files]
    same_inputs = content is not None and content["inputs"] == inputs
    if content is None or not same_inputs or settings_of(content) != settings.record():
        if settings.overwrite:
            return None
        raise UserError(
            f"other output with this name: {prefix}: it was created from other inputs or with "
            "other options: choose another prefix or use --overwrite"
        )
    paths = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    paths["loss_mask_bin"] = bin_path(loss_mask_prefix(prefix))
    paths["hashes"] = hashes_path(prefix)
    for name, path in paths.items():
        digest = content["sha256"].get(name)
        if digest is not None and (not path.exists() or sha256_of(path) != digest):
            logger.warning(
                "building the partition again: %s does not match the hash in its sidecar", path
            )
            if settings.shard is not None:
                for output in output_paths(settings.output_prefix, key):
                    remove_file(output)
            return None
    return content

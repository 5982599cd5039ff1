"""Makes the parts of a job on a Ray cluster.

In: the address of a cluster, and the job. Out: every part's datasets, in the folder that all
machines share, as `run_part` makes them here.

Jobs in parts: for job arrays, and so that a killed job goes on where it stopped.

In: the input files of a job. Out: the files of a part, datasets of parts, or all parts merged.

A part is a run of input files that follow each other, so parts merged in order hold the bytes of
the undivided job. A part is finished when its files lie under their final names; before it is
kept, its sidecar is compared with what the job asks for, and its hashes with its content.
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
from megatron_chatflow.preprocess.merge import PartsPolicy, merge_datasets
from megatron_chatflow.preprocess.output import document_prefix, output_paths
from megatron_chatflow.preprocess.readers import InputFile
from megatron_chatflow.preprocess.settings import PreprocessSettings

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


Job = Callable[[PreprocessSettings, Sequence[InputFile], int], Contents]


def parse_shard(text: str) -> tuple[int, int]:
    """Number and count of a shard, from text such as `3/16`.

    Raises:
        ValueError: It is not two whole numbers.
    """
    number, count = text.split("/")
    return int(number), int(count)


def split_files(files: Sequence[InputFile], num_parts: int) -> list[list[InputFile]]:
    """Cuts the list of files into runs of about the same number of bytes; some may be empty."""
    parts: list[list[InputFile]] = [[] for _ in range(num_parts)]
    total = sum(file.num_bytes for file in files)
    num_before = 0
    for file in files:
        middle = num_before + file.num_bytes / 2
        parts[min(int(middle * num_parts / max(total, 1)), num_parts - 1)].append(file)
        num_before += file.num_bytes
    return parts


def part_prefix(output_prefix: str, number: int, num_parts: int) -> str:
    """Path that the names of a part's outputs begin with."""
    return f"{output_prefix}_part{number:05d}of{num_parts:05d}"


def run_part(
    settings: PreprocessSettings, files: Sequence[InputFile], job: Job, num_bad_before: int = 0
) -> Contents:
    """Makes the part that the settings' shard names, unless it is there already.

    Args:
        settings: The whole job.
        files: The whole job's.
        job: Makes datasets of some files; an empty one where no document is left.
        num_bad_before: Bad lines of the parts before, which count as well.

    Returns:
        For each output key what its sidecar says.

    Raises:
        UserError: There is other data under the part's name, or as `job` does.
    """
    assert settings.shard is not None
    number, num_parts = settings.shard
    _check_divisible(files)
    prefix = part_prefix(settings.output_prefix, number, num_parts)
    part_settings = replace(settings, output_prefix=prefix)
    part_files = split_files(files, num_parts)[number]
    contents = {key: _finished(part_settings, part_files, key) for key in settings.corpus.json_keys}
    found = {key: content for key, content in contents.items() if content is not None}
    if len(found) == len(contents):
        logger.info("part %d of %d is finished: %s", number, num_parts, prefix)
        return found
    overwrite = settings.overwrite or bool(found)
    return job(replace(part_settings, overwrite=overwrite), part_files, num_bad_before)


def run_all_parts(settings: PreprocessSettings, files: Sequence[InputFile], job: Job) -> Contents:
    """Makes every part that is not there yet, here or on a cluster, merges them, removes them.

    Args:
        settings: The whole job.
        files: The whole job's.
        job: As for `run_part`.

    Returns:
        For each output key what its sidecar says.

    Raises:
        UserError: As `run_part` and `merge_datasets` do, or no document is left.
    """
    _check_divisible(files)
    merged = {key: merged_already(settings, files, key) for key in settings.corpus.json_keys}
    contents = {key: content for key, content in merged.items() if content is not None}
    if len(contents) < len(merged):
        _make_parts(settings, files, job, set(merged) - set(contents))
        policy = PartsPolicy(
            max_bad_lines=settings.max_bad_lines, max_dropped_share=settings.max_dropped_share
        )
        for key in settings.corpus.json_keys:
            if key not in contents:
                prefix = document_prefix(settings.output_prefix, key)
                parts = [document_prefix(part, key) for part in _part_prefixes(settings)]
                merge_datasets(parts, prefix, overwrite=True, policy=policy)
                contents[key] = read_sidecar(prefix) or {}
    for path in _part_files(settings):
        remove_file(path)
    return {key: contents[key] for key in settings.corpus.json_keys}


def _make_parts(
    settings: PreprocessSettings, files: Sequence[InputFile], job: Job, keys: set[str]
) -> None:
    """Makes the parts that are not there; refuses if none of them has a document for a key."""
    count = settings.num_partitions
    parts: list[Contents] = []
    if settings.ray is not None:
        parts = make_parts(settings, files, partial(run_part, job=job))
    else:
        num_bad = 0
        for number in range(count):
            part = replace(settings, shard=(number, count))
            parts.append(run_part(part, files, job, num_bad))
            num_bad += max(content["num_bad_lines"] for content in parts[-1].values())
    for key in settings.corpus.json_keys:
        if key in keys and not any(part[key]["num_documents"] for part in parts):
            raise UserError(f"no document left: {document_prefix(settings.output_prefix, key)}")


def merged_already(
    settings: PreprocessSettings, files: Sequence[InputFile], key: str
) -> dict[str, Any] | None:
    """The sidecar of a key whose parts a killed job of the same kind had merged, but not removed.

    Args:
        settings: The whole job.
        files: The whole job's.
        key: The output key.
    """
    if not any(path.exists() for path in _part_files(settings)):
        return None
    try:
        return _finished(replace(settings, overwrite=False), files, key)
    except UserError:  # other data, which `overwrite` replaces and its absence refuses
        return None


def _part_prefixes(settings: PreprocessSettings) -> list[str]:
    count = settings.num_partitions
    return [part_prefix(settings.output_prefix, number, count) for number in range(count)]


def _part_files(settings: PreprocessSettings) -> Iterator[Path]:
    """Every name that a file of a part may have, of any key: while one is there, so is work."""
    for part in _part_prefixes(settings):
        for key in settings.corpus.json_keys:
            yield from output_paths(part, key)


def _check_divisible(files: Sequence[InputFile]) -> None:
    for file in files:
        if file.path is None or not file.path.is_file():
            raise UserError(f"cannot be cut into parts: {file.name}: name files, folders or globs")


def _finished(
    settings: PreprocessSettings, files: Sequence[InputFile], key: str
) -> dict[str, Any] | None:
    """The sidecar of a part that this job would make, if it is there and whole."""
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
            f"other data under this name: {prefix}: made of other inputs or with other options: "
            "choose another prefix or use --overwrite"
        )
    paths = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    paths["loss_mask_bin"] = bin_path(loss_mask_prefix(prefix))
    paths["hashes"] = hashes_path(prefix)
    for name, path in paths.items():
        digest = content["sha256"].get(name)
        if digest is not None and (not path.exists() or sha256_of(path) != digest):
            logger.warning("made again: %s is not what its sidecar says", path)
            if settings.shard is not None:
                for output in output_paths(settings.output_prefix, key):
                    remove_file(output)
            return None
    return content

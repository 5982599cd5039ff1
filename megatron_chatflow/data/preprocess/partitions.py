"""Jobs in parts: for job arrays, and so that a killed job goes on where it stopped.

In: the input files of a job. Out: the files of a part, datasets of parts, or all parts merged.

A part is a run of input files that follow each other, so parts merged in order hold the bytes of
the undivided job. A part is finished when its files lie under their final names; before it is
kept, its sidecar is compared with what the job asks for, and its hashes with its content.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chatflow.corpus.inputs import InputFile
from megatron_chatflow.data.indexed import bin_path, idx_path
from megatron_chatflow.data.preprocess.merge import merge_datasets
from megatron_chatflow.data.preprocess.output import document_prefix, output_paths
from megatron_chatflow.data.preprocess.settings import PreprocessSettings
from megatron_chatflow.data.sidecar import loss_mask_prefix, read_sidecar
from megatron_chatflow.errors import UserError

logger = logging.getLogger(__name__)
Contents = dict[str, dict[str, Any]]
Job = Callable[[PreprocessSettings, Sequence[InputFile]], Contents]


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
    settings: PreprocessSettings, files: Sequence[InputFile], number: int, num_parts: int, job: Job
) -> Contents:
    """Makes one part, unless it is there already.

    Args:
        settings: The whole job.
        files: The whole job's.
        number: Of the part, from 0.
        num_parts: How many there are.
        job: Makes datasets of some files; an empty one where no document is left.

    Returns:
        For each output key what its sidecar says.

    Raises:
        UserError: There is other data under the part's name, or as `job` does.
    """
    for file in files:
        if file.path is None or not file.path.is_file():
            raise UserError(f"cannot be cut into parts: {file.name}: name files, folders or globs")
    prefix = part_prefix(settings.output_prefix, number, num_parts)
    part_settings = replace(settings, output_prefix=prefix)
    part_files = split_files(files, num_parts)[number]
    contents = {key: _finished(part_settings, part_files, key) for key in settings.corpus.json_keys}
    found = {key: content for key, content in contents.items() if content is not None}
    if len(found) == len(contents):
        logger.info("part %d of %d is finished: %s", number, num_parts, prefix)
        return found
    return job(replace(part_settings, overwrite=settings.overwrite or bool(found)), part_files)


def run_all_parts(
    settings: PreprocessSettings, files: Sequence[InputFile], num_parts: int, job: Job
) -> Contents:
    """Makes every part that is not there yet, merges them, and removes them.

    Args:
        settings: The whole job.
        files: The whole job's.
        num_parts: How many there are.
        job: As for `run_part`.

    Returns:
        For each output key what its sidecar says.

    Raises:
        UserError: As `run_part` and `merge_datasets` do, or no document is left.
    """
    parts = [run_part(settings, files, number, num_parts, job) for number in range(num_parts)]
    contents: Contents = {}
    prefixes = [
        part_prefix(settings.output_prefix, number, num_parts) for number in range(num_parts)
    ]
    for key in settings.corpus.json_keys:
        if not any(part[key]["num_documents"] for part in parts):
            raise UserError(f"no document left: {document_prefix(settings.output_prefix, key)}")
        merged = document_prefix(settings.output_prefix, key)
        shards = [document_prefix(prefix, key) for prefix in prefixes]
        merge_datasets(shards, merged, overwrite=settings.overwrite)
        content = read_sidecar(merged)
        assert content is not None
        contents[key] = content
    for prefix in prefixes:
        for key in settings.corpus.json_keys:
            for path in output_paths(prefix, key):
                path.unlink(missing_ok=True)
    return contents


def _finished(
    settings: PreprocessSettings, files: Sequence[InputFile], key: str
) -> dict[str, Any] | None:
    """The sidecar of a part that this job would make, if it is there and whole."""
    prefix = document_prefix(settings.output_prefix, key)
    if not idx_path(prefix).exists():
        return None
    content = read_sidecar(prefix)
    inputs = [{"name": file.name, "num_bytes": file.num_bytes} for file in files]
    if content is None or content["inputs"] != inputs or content["settings"] != settings.record():
        if settings.overwrite:
            return None
        raise UserError(
            f"other data under this name: {prefix}: made of other inputs or with other options: "
            "choose another prefix or use --overwrite"
        )
    paths = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    paths["loss_mask_bin"] = bin_path(loss_mask_prefix(prefix))
    for name, digest in content["sha256"].items():
        if not paths[name].exists() or _sha256_of(paths[name]) != digest:
            logger.warning("made again: %s is not what its sidecar says", paths[name])
            for path in output_paths(settings.output_prefix, key):
                path.unlink(missing_ok=True)
            return None
    return content


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

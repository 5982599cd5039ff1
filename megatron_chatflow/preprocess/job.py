"""Runs a preprocessing job, whole or in partitions.

The parent process reads chunks and writes results. Workers parse and encode the chunks. Results are
written in the order of the chunks, and the number of pending chunks is limited, so the output does
not depend on the number of workers and memory does not grow with the corpus.

A partition is a consecutive run of the job's input files, so merging all partitions in order gives
the same bytes as the undivided job. Partitions serve three purposes: job arrays (`--shard I/N`
builds one), restarts (`--partitions N` continues after the last finished partition), and Ray
clusters (`--ray`; every machine must see the inputs and outputs at the same paths). A partition is
finished once its files have their final names. Before it is reused, its sidecar is compared with
the job's settings and its files with the recorded hashes.
"""

import logging
import math
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from megatron_chatflow.data.fingerprint import dataset_files
from megatron_chatflow.data.indexed import idx_path
from megatron_chatflow.data.sidecar import hashes_path, read_sidecar, settings_of, sha256_of
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    PARTIAL_SUFFIX,
    check_output_file,
    is_url,
    publish_all,
    remove_file,
)
from megatron_chatflow.preprocess.dropped import check_dropped_share, hint_of
from megatron_chatflow.preprocess.encode import (
    ChunkWorker,
    EncodedChunk,
    encode_in_worker,
    start_worker,
)
from megatron_chatflow.preprocess.languages import is_identified_as_other
from megatron_chatflow.preprocess.merge import PartitionPolicy, merge_datasets
from megatron_chatflow.preprocess.output import KeyOutput, document_prefix, output_paths
from megatron_chatflow.preprocess.pairs import PairSettings
from megatron_chatflow.preprocess.readers import (
    Chunk,
    CorpusReader,
    InputFile,
    check_kind,
    find_inputs,
)
from megatron_chatflow.preprocess.settings import PreprocessSettings
from megatron_chatflow.preprocess.staged_upload import StagedUpload
from megatron_chatflow.remote import parse_location
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0
MAX_PENDING_CHUNKS = 3  # per worker: one in progress, one waiting, one finished
Contents = dict[str, dict[str, Any]]
"""Sidecars by output key."""


def preprocess(settings: PreprocessSettings) -> Contents:
    """Runs a preprocessing job and returns the sidecar of each output key.

    Raises:
        UserError: A setting is invalid, an input cannot be read or has too many bad lines, an
            output exists or cannot be written, the tokenizer cannot be loaded, too many records
            were dropped, or no document is left.
    """
    corpus = settings.corpus
    with_scores = corpus.pairs.score_name is not None
    files = find_inputs(settings.inputs, corpus.sides, with_scores=with_scores)
    output_prefix = parse_location(settings.output_prefix)
    if is_url(output_prefix):
        return _preprocess_to_url(replace(settings, output_prefix=output_prefix), files)
    return _preprocess(replace(settings, output_prefix=output_prefix), files)


def _preprocess(settings: PreprocessSettings, files: list[InputFile]) -> Contents:
    if settings.ray is not None:
        settings = _with_cluster_defaults(settings, files)
    _check(settings, files)
    if settings.shard is not None:
        return run_partition(settings, files)
    if settings.num_partitions > 1 or settings.ray is not None:
        return _run_all_partitions(settings, files)
    return preprocess_files(settings, files)


def _preprocess_to_url(settings: PreprocessSettings, files: list[InputFile]) -> Contents:
    """Builds the outputs on the local disk and uploads them.

    The local files stay until every upload has succeeded. If the job is killed or the network
    fails, the same command on the same machine continues with the unfinished partition or upload.
    """
    if settings.ray is not None:
        raise UserError(
            f"--output-prefix {settings.output_prefix}: --ray needs a folder that all machines "
            "share; use --shard in a job array to write to a URL from several machines"
        )
    shard, count = settings.shard, settings.num_partitions
    name, own_files = PurePosixPath(settings.output_prefix).name, files
    if shard is not None:
        _check_divisible(files)
        name = _partition_prefixes(replace(settings, output_prefix=name), shard[1])[shard[0]]
        own_files = split_files(files, shard[1])[shard[0]]
    keys = settings.corpus.json_keys
    with StagedUpload(settings.output_prefix, job="" if shard is None else name) as staged:
        # What is here belongs to an earlier attempt and may be replaced.
        local = replace(settings, output_prefix=str(staged.prefix), overwrite=True)
        own = replace(local, output_prefix=str(staged.folder / name))
        found = {key: _finished(own, own_files, key) for key in keys}
        contents = {key: content for key, content in found.items() if content is not None}
        if len(contents) == len(keys):
            logger.info("the output is finished; the upload continues: %s", staged.folder)
        else:
            if shard is not None and not settings.overwrite:
                prefixes = {key: document_prefix(own.output_prefix, key) for key in keys}
                found = {key: staged.published_sidecar(prefixes[key]) for key in keys}
                contents = {key: content for key, content in found.items() if content is not None}
                if len(contents) == len(keys) and all(
                    _is_of_job(content, own, own_files) for content in contents.values()
                ):
                    logger.info("partition %d of %d is finished: %s", *shard, name)
                    return contents
            datasets = [document_prefix(own.output_prefix, key) for key in keys]
            staged.begin(datasets, overwrite=settings.overwrite)
            if shard is None and count > 1:
                staged.fetch(f"{name}_part*of{count:05d}_*")
            contents = _preprocess(local, files)
        outputs = [output_paths(own.output_prefix, key) for key in keys]
        staged.publish(outputs, overwrite=settings.overwrite)
        if shard is None and count > 1:
            staged.remove_remote(f"{name}_part*of{count:05d}_*")
    return contents


def preprocess_files(
    settings: PreprocessSettings, files: Sequence[InputFile], num_bad_before: int = 0
) -> Contents:
    """Builds the datasets of some files and returns the sidecar of each key; see `preprocess`.

    If `shard` is set, the output prefix is that of the partition, and the datasets may be empty.
    ``num_bad_before`` bad lines in earlier partitions count towards `max_bad_lines`.
    """
    tokenizer = load_tokenizer(settings.tokenizer_model, settings.tokenizer_type)
    if tokenizer.tokenizer_type == "HuggingFaceTokenizer":
        logger.info("encoding with the tokenizers library, as the model is a tokenizer.json")
    _check_bos(settings, tokenizer)
    settings = _with_control_tokens(settings, tokenizer)
    keys = settings.corpus.json_keys
    outputs: dict[str, KeyOutput] = {}
    try:
        for key in keys:
            outputs[key] = KeyOutput(settings, key, tokenizer)
        inputs, num_bad = _fill(settings, files, tokenizer, outputs, num_bad_before)
        return _publish(outputs, inputs, settings, num_bad)
    finally:
        for output in outputs.values():
            output.discard()


def _check_bos(settings: PreprocessSettings, tokenizer: Tokenizer) -> None:
    if settings.append_bos and tokenizer.bos_id < 0:
        raise UserError(
            f"--append-bos: the tokenizer has no BOS token: {tokenizer.model_path}: remove the flag"
        )
    template = settings.corpus.chat_template
    is_written = template is not None and "bos_token" in template.source
    if tokenizer.add_bos_token and not settings.append_bos and not is_written:
        logger.warning(
            "%s begins texts with BOS (add_bos_token), but these documents do not: use "
            "--append-bos to add it",
            tokenizer.model_path,
        )


def _with_control_tokens(settings: PreprocessSettings, tokenizer: Tokenizer) -> PreprocessSettings:
    """Adds the tokenizer's control tokens to the chat template and validates the template."""
    template = settings.corpus.chat_template
    if template is None:
        return settings
    names = tuple(sorted(tokenizer.special_tokens.items()))
    template = replace(template, control_tokens=tokenizer.control_tokens, special_tokens=names)
    template.check()
    return replace(settings, corpus=replace(settings.corpus, chat_template=template))


def _check(settings: PreprocessSettings, files: list[InputFile]) -> None:
    """Validates the settings before any input is read."""
    if not 0 <= settings.max_dropped_share <= 1:
        raise UserError(f"max_dropped_share: {settings.max_dropped_share}: must be from 0 to 1")
    if settings.corpus.max_record_bytes < 1:
        raise UserError(
            f"--max-record-bytes: {settings.corpus.max_record_bytes}: must be at least 1"
        )
    if not settings.corpus.max_expansion >= 0:
        raise UserError(
            f"--max-expansion: {settings.corpus.max_expansion}: must be at least 0 (0: no limit)"
        )
    minimums = {"num_workers": 1, "max_bad_lines": 0, "max_tokens": 1, "num_partitions": 1}
    for name, smallest in minimums.items():
        value = getattr(settings, name)
        if value is not None and value < smallest:
            raise UserError(f"{name}: {value}: must be at least {smallest}")
    if settings.shard is not None and not 0 <= settings.shard[0] < settings.shard[1]:
        number, num_partitions = settings.shard
        raise UserError(
            f"--shard {number}/{num_partitions}: the first shard is 0/{num_partitions}, and the "
            f"last one is {num_partitions - 1}/{num_partitions}"
        )
    if settings.shard is not None and (settings.num_partitions > 1 or settings.ray is not None):
        raise UserError(
            "--shard processes a single partition: do not combine it with --partitions or --ray"
        )
    settings.corpus.chats.check()
    if settings.corpus.loss == "all" and settings.corpus.chats.train_on != ("all",):
        raise UserError(
            f"--train-on {' '.join(settings.corpus.chats.train_on)}: --loss all already trains "
            "every token: remove one of the two"
        )
    if settings.corpus.format == "pairs":
        _check_pairs(settings.corpus.pairs)
    for file in files:
        check_kind(file, settings.corpus)
    keys = settings.corpus.json_keys
    if len(set(keys)) != len(keys) or not keys:
        raise UserError(f"--json-keys: {' '.join(keys)}: list each key only once")
    if settings.corpus.format != "text" and len(keys) > 1:
        raise UserError(
            f"--json-keys: {' '.join(keys)}: give only one key for pairs and chats, which have "
            "one output"
        )
    if len(keys) > 1 and any(file.kind == "txt" for file in files):
        raise UserError(
            "--json-keys: give only one key, which names the output, because .txt files have no "
            "keys"
        )
    for key in keys:
        _check_output(settings, files, key)


def _check_pairs(pairs: PairSettings) -> None:
    if pairs.min_score is not None and not math.isfinite(pairs.min_score):
        raise UserError(f"--pair-min-score: {pairs.min_score}: must be a finite number")
    if not 0 <= pairs.max_punctuation_ratio <= 1:
        raise UserError(
            f"--pair-max-punctuation-ratio: {pairs.max_punctuation_ratio:g}: must be from 0 (no "
            "limit) to 1"
        )
    if pairs.codes == pairs.languages and pairs.template != "plain":
        logger.warning(
            "--pair-languages %s: instructions will name the languages by these codes; to name "
            "them in words, give the codes with --pair-keys and the words with --pair-languages",
            " ".join(pairs.languages),
        )
    if pairs.identify_languages:
        for code in pairs.codes:
            is_identified_as_other("", code)  # checks that the language is known


def _check_output(settings: PreprocessSettings, files: list[InputFile], key: str) -> None:
    """Raises an error if an output exists, unless a killed job of the same kind left it behind."""
    paths = output_paths(settings.output_prefix, key)
    for path in paths:
        check_output_file(path)
    existing = [path for path in paths if path.exists()]
    if settings.overwrite or not existing:
        return
    index = paths[0]  # published last, so it is missing if a job was killed while publishing
    if not index.exists() and index.with_name(index.name + PARTIAL_SUFFIX).exists():
        return
    if settings.num_partitions > 1 and _merged_already(settings, files, key) is not None:
        return
    raise UserError(f"output exists: {existing[0]}: choose another prefix or use --overwrite")


def _fill(
    settings: PreprocessSettings,
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    outputs: dict[str, KeyOutput],
    num_bad_before: int,
) -> tuple[list[dict[str, Any]], int]:
    """Writes all documents. Returns the name and size of each input and the number of bad lines."""
    reader = CorpusReader(files, settings.corpus)
    progress = ProgressBar(sum(file.num_bytes for file in files))
    num_bad = 0
    first_bad: str | None = None
    try:
        for encoded in _encoded_chunks(settings, reader.chunks(), tokenizer):
            parsed = encoded.parsed
            num_bad += parsed.num_bad
            first_bad = first_bad or parsed.first_bad
            if num_bad_before + num_bad > settings.max_bad_lines:
                reasons = [hint for name in parsed.num_dropped if (hint := hint_of(name))]
                advice = "; ".join([*reasons, "correct the input, or raise --max-bad-lines"])
                raise UserError(
                    f"too many bad lines: {first_bad}: this is the first of more than "
                    f"{settings.max_bad_lines}: {advice}"
                )
            for key, output in outputs.items():
                output.add(encoded.documents[key])
                output.num_dropped.update(parsed.num_dropped)
                output.num_repaired.update(parsed.num_repaired)
            num_documents = max(output.documents.num_documents for output in outputs.values())
            progress.update(encoded.num_bytes_read, num_documents)
    finally:
        progress.close()
    if first_bad is not None:
        logger.warning("dropped %d bad lines, the first at %s", num_bad, first_bad)
    inputs = [
        {"name": file.name, "num_bytes": num_bytes}
        for file, num_bytes in zip(files, reader.num_bytes, strict=True)
    ]
    return inputs, num_bad


def _encoded_chunks(
    settings: PreprocessSettings, chunks: Iterator[Chunk], tokenizer: Tokenizer
) -> Iterator[EncodedChunk]:
    """Encodes chunks in this process or in workers and yields them in order."""
    if settings.num_workers == 1:
        worker = ChunkWorker(settings, tokenizer)
        for chunk in chunks:
            yield worker.encode(chunk)
        return
    executor: Executor
    if settings.corpus.format == "text" and tokenizer.runs_in_threads:
        executor = ThreadPoolExecutor(settings.num_workers)
        encode = ChunkWorker(settings, tokenizer).encode
    else:
        executor = ProcessPoolExecutor(
            settings.num_workers,
            # Forking a process with threads (of the progress bar or a tokenizer) can deadlock.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(settings,),
        )
        encode = encode_in_worker
    pending: deque[Future[EncodedChunk]] = deque()
    failure: UserError | None = None
    exhausted = False
    try:
        while True:
            while not exhausted and len(pending) < MAX_PENDING_CHUNKS * settings.num_workers:
                try:
                    pending.append(executor.submit(encode, next(chunks)))
                except StopIteration:
                    exhausted = True
                except UserError as error:  # raised below, after the results of earlier chunks
                    failure, exhausted = error, True
            if not pending:
                break
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died: the system may have run out of memory: use fewer --workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    if failure is not None:
        raise failure


def _publish(
    outputs: dict[str, KeyOutput],
    inputs: list[dict[str, Any]],
    settings: PreprocessSettings,
    num_bad: int,
) -> Contents:
    """Completes all outputs and publishes them under their final names."""
    files = []
    contents = {}
    for key, output in outputs.items():
        key_files, contents[key] = output.seal(inputs, num_bad)
        files += key_files
        if settings.shard is None:
            check_dropped_share(contents[key], output.prefix, settings.max_dropped_share)
    for key in outputs:
        for path in output_paths(settings.output_prefix, key):
            remove_file(path)  # with --overwrite, so that new and old files never coexist
    publish_all(files)
    return contents


def _with_cluster_defaults(
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


def _build_on_cluster(settings: PreprocessSettings, files: Sequence[InputFile]) -> list[Contents]:
    """Builds every partition of a job in one Ray task each.

    Every task requests `num_workers` CPUs and sees the inputs at the same absolute paths. If a
    partition fails, unfinished partitions are cancelled and finished ones are kept.
    """
    assert settings.ray is not None
    with ray_session(settings.ray) as ray:
        max_cpus = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes()), default=0)
        if settings.num_workers > max_cpus:
            raise UserError(
                f"--workers {settings.num_workers}: a partition needs that many CPUs, and the "
                f"largest machine of the cluster has {max_cpus}; use fewer workers"
            )
        task = ray.remote(num_cpus=settings.num_workers, max_retries=2)(_run_task)
        count = settings.num_partitions
        shards = [replace(settings, shard=(number, count)) for number in range(count)]
        everywhere = [file.absolute() for file in files]
        references = [task.remote(shard, everywhere) for shard in shards]
        numbers = {reference: number for number, reference in enumerate(references)}
        contents: list[Contents] = [{} for _ in references]
        waiting = references
        while waiting:
            (done, *_), waiting = ray.wait(waiting, num_returns=1)
            number = numbers[done]
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                result = UserError(f"partition {number} of {count} failed on the cluster: {error}")
                result.__cause__ = error
            if isinstance(result, UserError):
                for reference in waiting:
                    ray.cancel(reference, force=True)
                raise result
            contents[number] = result
            logger.info("%d of %d partitions are finished", count - len(waiting), count)
    return contents


def _run_task(settings: PreprocessSettings, files: list[InputFile]) -> Contents | UserError:
    """Builds a partition in a Ray task. Returns a `UserError`, because Ray wraps raised errors."""
    try:
        return run_partition(settings, files)
    except UserError as error:
        return error


@contextmanager
def ray_session(address: str) -> Iterator[Any]:
    """Connects to a Ray cluster and yields the ``ray`` module.

    Raises:
        UserError: ray is not installed, or there is no cluster at the address.
    """
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
        number = int(middle * num_partitions / max(total, 1))
        partitions[min(number, num_partitions - 1)].append(file)
        num_before += file.num_bytes
    return partitions


def run_partition(
    settings: PreprocessSettings, files: Sequence[InputFile], num_bad_before: int = 0
) -> Contents:
    """Builds the partition of a job that `settings.shard` selects, if it is not finished yet.

    ``num_bad_before`` bad lines in earlier partitions count towards `max_bad_lines`.

    Raises:
        UserError: Other data exists at the partition's paths; or see `preprocess`.
    """
    assert settings.shard is not None
    number, num_partitions = settings.shard
    _check_divisible(files)
    prefix = _partition_prefixes(settings, num_partitions)[number]
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
    return preprocess_files(
        replace(partition_settings, overwrite=overwrite), partition_files, num_bad_before
    )


def _run_all_partitions(settings: PreprocessSettings, files: Sequence[InputFile]) -> Contents:
    """Builds the missing partitions here or on a cluster, merges all and removes them."""
    _check_divisible(files)
    merged = {key: _merged_already(settings, files, key) for key in settings.corpus.json_keys}
    contents = {key: content for key, content in merged.items() if content is not None}
    if len(contents) < len(merged):
        _build_partitions(settings, files, set(merged) - set(contents))
        policy = PartitionPolicy(
            max_bad_lines=settings.max_bad_lines, max_dropped_share=settings.max_dropped_share
        )
        for key in settings.corpus.json_keys:
            if key not in contents:
                prefix = document_prefix(settings.output_prefix, key)
                prefixes = _partition_prefixes(settings, settings.num_partitions)
                partitions = [document_prefix(partition, key) for partition in prefixes]
                merge_datasets(partitions, prefix, overwrite=True, policy=policy)
                contents[key] = read_sidecar(prefix) or {}
    for path in _partition_files(settings):
        remove_file(path)
    return {key: contents[key] for key in settings.corpus.json_keys}


def _build_partitions(
    settings: PreprocessSettings, files: Sequence[InputFile], keys: set[str]
) -> None:
    """Builds the missing partitions; raises an error if one of ``keys`` has no document."""
    count = settings.num_partitions
    partitions: list[Contents] = []
    if settings.ray is not None:
        partitions = _build_on_cluster(settings, files)
    else:
        num_bad = 0
        for number in range(count):
            partition = replace(settings, shard=(number, count))
            partitions.append(run_partition(partition, files, num_bad))
            num_bad += max(content["num_bad_lines"] for content in partitions[-1].values())
    for key in settings.corpus.json_keys:
        if key in keys and not any(partition[key]["num_documents"] for partition in partitions):
            raise UserError(f"no document left: {document_prefix(settings.output_prefix, key)}")


def _merged_already(
    settings: PreprocessSettings, files: Sequence[InputFile], key: str
) -> dict[str, Any] | None:
    """Returns the merged sidecar of a key if an equal job was killed after merging it."""
    if not any(path.exists() for path in _partition_files(settings)):
        return None
    try:
        return _finished(replace(settings, overwrite=False), files, key)
    except UserError:  # other data, which the caller handles
        return None


def _partition_prefixes(settings: PreprocessSettings, count: int) -> list[str]:
    return [f"{settings.output_prefix}_part{number:05d}of{count:05d}" for number in range(count)]


def _partition_files(settings: PreprocessSettings) -> Iterator[Path]:
    """Yields every path that an output of a partition may have, for all keys."""
    for partition in _partition_prefixes(settings, settings.num_partitions):
        for key in settings.corpus.json_keys:
            yield from output_paths(partition, key)


def _check_divisible(files: Sequence[InputFile]) -> None:
    for file in files:
        if file.path is None or not file.path.is_file():
            raise UserError(
                f"cannot be split into partitions: {file.name}: use files, folders or globs as "
                "the input"
            )


def _is_of_job(
    content: dict[str, Any], settings: PreprocessSettings, files: Sequence[InputFile]
) -> bool:
    """Returns whether a sidecar describes the output of this job with these inputs."""
    inputs = [{"name": file.name, "num_bytes": file.num_bytes} for file in files]
    return bool(content["inputs"] == inputs and settings_of(content) == settings.record())


def _finished(
    settings: PreprocessSettings, files: Sequence[InputFile], key: str
) -> dict[str, Any] | None:
    """Returns the sidecar of a finished, undamaged dataset of this job; None if there is none."""
    prefix = document_prefix(settings.output_prefix, key)
    if not idx_path(prefix).exists():
        return None
    content = read_sidecar(prefix)
    if content is None or not _is_of_job(content, settings, files):
        if settings.overwrite:
            return None
        raise UserError(
            f"other output with this name: {prefix}: it was created from other inputs or with "
            "other options: choose another prefix or use --overwrite"
        )
    paths = dataset_files(prefix, with_loss_mask=True) | {"hashes": hashes_path(prefix)}
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


class ProgressBar:
    """Shows a progress bar on a terminal, and prints a line every 30 seconds elsewhere."""

    def __init__(self, num_total_bytes: int) -> None:
        """Initializes the display. The total size of the inputs is 0 if it is unknown."""
        self._num_total_bytes = num_total_bytes
        self._num_bytes = 0
        self._begin = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            total = num_total_bytes or None
            self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True)

    def update(self, num_bytes: int, num_documents: int) -> None:
        """Updates the display with the bytes read from disk and the documents written so far."""
        if self._bar is not None:
            self._bar.set_postfix(documents=num_documents, refresh=False)
            self._bar.update(num_bytes - self._num_bytes)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            seconds = self._last_line - self._begin
            share = f" of {self._num_total_bytes / 1e6:.1f}" if self._num_total_bytes else ""
            print(
                f"{num_bytes / 1e6:.1f}{share} MB, {num_documents} documents, "
                f"{num_bytes / 1e6 / seconds:.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )
        self._num_bytes = num_bytes

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()

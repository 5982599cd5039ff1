"""Runs a preprocessing job.

The parent process reads chunks and writes results. Workers parse and encode the chunks. Results are
written in the order of the chunks, and the number of pending chunks is limited, so the output does
not depend on the number of workers and memory does not grow with the corpus.
"""

import logging
import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import PARTIAL_SUFFIX, check_output_file, publish_all, remove_file
from megatron_chatflow.preprocess.dropped import check_dropped_share, hint_of
from megatron_chatflow.preprocess.encode import (
    ChunkWorker,
    EncodedChunk,
    encode_in_worker,
    start_worker,
)
from megatron_chatflow.preprocess.output import KeyOutput, output_paths
from megatron_chatflow.preprocess.partitions import (
    merged_already,
    run_all_partitions,
    run_partition,
    with_cluster_defaults,
)
from megatron_chatflow.preprocess.readers import Chunk, CorpusReader, InputFile, find_inputs
from megatron_chatflow.preprocess.settings import PreprocessSettings
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

SECONDS_BETWEEN_LINES = 30.0

logger = logging.getLogger(__name__)
MAX_PENDING_CHUNKS = 3  # per worker: one in progress, one waiting, one finished


def preprocess(settings: PreprocessSettings) -> dict[str, dict[str, Any]]:
    """Runs a preprocessing job.

    Args:
        settings: The settings of the job.

    Returns:
        The sidecar of each output key.

    Raises:
        UserError: A setting is invalid, an input cannot be read or has too many bad lines, an
            output exists or cannot be written, the tokenizer cannot be loaded, too many records
            were dropped, or no document is left.
    """
    files = find_inputs(settings.inputs)
    if settings.ray is not None:
        settings = with_cluster_defaults(settings, files)
    _check(settings, files)
    if settings.shard is not None:
        return run_partition(settings, files, preprocess_files)
    if settings.num_partitions > 1 or settings.ray is not None:
        return run_all_partitions(settings, files, preprocess_files)
    return preprocess_files(settings, files)


def preprocess_files(
    settings: PreprocessSettings, files: Sequence[InputFile], num_bad_before: int = 0
) -> dict[str, dict[str, Any]]:
    """Builds the datasets of some files.

    Args:
        settings: The settings of the job. If `shard` is set, the output prefix is that of the
            partition, and the datasets may be empty.
        files: The files to read.
        num_bad_before: Number of bad lines in earlier partitions. They count towards
            `max_bad_lines`.

    Returns:
        The sidecar of each output key.

    Raises:
        UserError: See `preprocess`.
    """
    tokenizer = load_tokenizer(settings.tokenizer_model, settings.tokenizer_type)
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
    for name, smallest in (
        ("num_workers", 1),
        ("max_bad_lines", 0),
        ("max_tokens", 1),
        ("num_partitions", 1),
    ):
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
    if settings.num_partitions > 1 and merged_already(settings, files, key) is not None:
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
    reader = CorpusReader(files, settings.corpus.read_options)
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
    executor, encode = _executor(settings, tokenizer)
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


def _executor(
    settings: PreprocessSettings, tokenizer: Tokenizer
) -> tuple[Executor, Callable[[Chunk], EncodedChunk]]:
    """Creates the workers: threads if the tokenizer can run in threads, otherwise processes."""
    if settings.corpus.format == "text" and tokenizer.runs_in_threads:
        return ThreadPoolExecutor(settings.num_workers), ChunkWorker(settings, tokenizer).encode
    executor = ProcessPoolExecutor(
        settings.num_workers,
        # Forking a process with threads (of the progress bar or a tokenizer) can deadlock.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(settings,),
    )
    return executor, encode_in_worker


def _publish(
    outputs: dict[str, KeyOutput],
    inputs: list[dict[str, Any]],
    settings: PreprocessSettings,
    num_bad: int,
) -> dict[str, dict[str, Any]]:
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


class ProgressBar:
    """Shows a progress bar on a terminal, and prints a line every 30 seconds elsewhere."""

    def __init__(self, num_total_bytes: int) -> None:
        """Initializes the display with no progress.

        Args:
            num_total_bytes: Total size of the inputs on disk in bytes; 0 if unknown.
        """
        self._num_total_bytes = num_total_bytes
        self._num_bytes = 0
        self._begin = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            total = num_total_bytes or None
            self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True)

    def update(self, num_bytes: int, num_documents: int) -> None:
        """Updates the display.

        Args:
            num_bytes: Number of bytes read from disk so far.
            num_documents: Number of documents written so far.
        """
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

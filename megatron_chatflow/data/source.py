"""A source: a named set of datasets, divided into samples and shuffled in every epoch.

`build_sources` opens the sources of a configuration. `Source.sample` returns the ``index``-th
sample drawn from a source in a few microseconds, independent of the index. `Source.fingerprint`
identifies the contents, and `Source.check_files` detects files that disappear or change during a
run.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_chatflow.config import DataConfig, SourceConfig
from megatron_chatflow.config.fields import parse_shares
from megatron_chatflow.data.fingerprint import (
    Vocabulary,
    block_hash,
    check_tokenizer,
    dataset_facts,
    dataset_files,
)
from megatron_chatflow.data.packing import (
    ALGORITHM_VERSION,
    Packing,
    cached_packing,
    make_packed_samples,
    mask_hashes,
    packing_key,
)
from megatron_chatflow.data.permutation import SampleOrder
from megatron_chatflow.data.samples import (
    Runs,
    Sample,
    Samples,
    SampleShape,
    Split,
    TokenFile,
    make_windows,
    open_token_file,
    split_runs,
)
from megatron_chatflow.data.token_counts import (
    cached_loss_tokens,
    packed_loss_tokens,
    window_loss_tokens,
)
from megatron_chatflow.errors import LocalError, UserError

logger = logging.getLogger(__name__)

_NUM_THREADS = 16  # threads mostly wait for a file server
_CHECK_SECONDS = 30.0  # limits the load of thousands of ranks on one file server


class SourceUnavailableError(LocalError):
    """A source's files are missing, changed or unreadable on this node."""


class Source:
    """One source of samples.

    Attributes:
        name: Name in the configuration.
        num_samples: Samples per epoch.
        num_tokens: Tokens per epoch.
        rows: Reads samples in file order.
        files: The datasets; empty if the samples do not come from files.
        packing: The documents of every sample; None if samples are windows.
        counted_tokens: What the weights of the schedule count, over an epoch: samples, tokens that
            are no padding, or loss tokens.
    """

    def __init__(
        self,
        name: str,
        samples: Samples,
        *,
        seed: int,
        split: Split,
        files: Sequence[TokenFile] = (),
        facts: dict[str, Any] | None = None,
        packing: Packing | None = None,
        counted_tokens: int | None = None,
    ) -> None:
        """Initializes a source. Use `build_sources` to create sources from a configuration.

        Only training samples are shuffled. The facts are those that `fingerprint` returns.
        """
        self.name = name
        self.num_samples = samples.num_samples
        self.num_tokens = samples.num_tokens
        self.rows = samples.rows
        self.packing = packing
        self.counted_tokens = samples.num_samples if counted_tokens is None else counted_tokens
        self._facts = facts or {}
        self._order = None
        if self.num_samples:
            shuffle = split == "train"
            self._order = SampleOrder(seed, name, self.num_samples, shuffle=shuffle)
        self.files = tuple(files)
        self._hashes: dict[Path, str] = {}
        self._paths = [path for file in files for path in _paths_of(file).values()]
        self._states = [_state_of(path) for path in self._paths]
        self._checked_at = time.monotonic()

    def use_seeds(self, seeds: Sequence[Sequence[int]]) -> None:
        """Sets the seeds of a run that changed its seed when it was resumed.

        ``seeds`` are pairs ``(first_epoch, seed)`` in ascending order of epochs.
        """
        if self._order is not None:
            (_, first), *later = seeds
            self._order = SampleOrder(
                first, self.name, self.num_samples, later_seeds=[(e, seed) for e, seed in later]
            )

    def sample(self, index: int) -> Sample:
        """Returns the ``index``-th sample drawn from this source, counted over all epochs.

        Raises:
            UserError: The sample is damaged or contains ids outside the vocabulary.
            SourceUnavailableError: The files can no longer be read.
        """
        return self.sample_in_order(self._shuffled().ordinal(index))

    def ordinals(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the positions in file order of many draws of this source, int64[n] each.

        Raises:
            UserError: The source has no samples.
        """
        return self._shuffled().ordinals(indices)

    def _shuffled(self) -> SampleOrder:
        if self._order is None:
            raise UserError(
                f"data.sources.{self.name}: has no samples: add data, or set its weight to 0"
            )
        return self._order

    def sample_in_order(self, ordinal: int) -> Sample:
        """Returns the ``ordinal``-th sample in file order, 0 <= ordinal < num_samples.

        Raises:
            UserError: The sample is damaged or contains ids outside the vocabulary.
            SourceUnavailableError: The files can no longer be read.
        """
        try:
            return Sample(*self.rows.read(ordinal))
        except OSError as error:
            raise SourceUnavailableError(str(error)) from error
        except ValueError as error:
            raise UserError(str(error)) from error

    def fingerprint(self) -> dict[str, Any]:
        """Returns a JSON-compatible description of the contents, independent of file names."""
        if not self._hashes:
            return self._facts
        hashes = [
            {name: self._hashes[path] for name, path in _paths_of(file).items()}
            for file in self.files
        ]
        return {**self._facts, "block_hash": hashes}

    def record_contents(self, hashes: Mapping[Path, str]) -> None:
        """Adds the `block_hash` of every file to the fingerprint."""
        self._hashes = {path: hashes[path] for path in self._paths}

    def check_files(self) -> None:
        """Checks, at most twice a minute, that the files still exist and are unchanged.

        A memory map stays valid after its file is deleted, so without this check a deleted file
        would not be detected until the next start. Sample blocks are read again only if a file was
        modified.

        Raises:
            SourceUnavailableError: A file is missing or changed. The next call checks again.
        """
        now = time.monotonic()
        if now - self._checked_at < _CHECK_SECONDS:
            return
        for number, path in enumerate(self._paths):
            where = f"data.sources.{self.name}: {path}"
            before = self._states[number]
            try:
                found = _state_of(path)
            except OSError as error:
                raise SourceUnavailableError(f"{where}: {error.strerror}") from error
            if found.num_bytes != before.num_bytes:
                raise SourceUnavailableError(
                    f"{where}: changed during the run, from {before.num_bytes} to "
                    f"{found.num_bytes} bytes"
                )
            if found != before and path in self._hashes:
                if block_hash(path) != self._hashes[path]:
                    raise SourceUnavailableError(
                        f"{where}: changed during the run, with the same size"
                    )
                self._states[number] = found
        self._checked_at = now


class _FileState(NamedTuple):
    """Metadata that changes whenever a file is modified or replaced."""

    num_bytes: int
    modified_ns: int
    inode: int


def _state_of(path: Path) -> _FileState:
    status = path.stat()
    return _FileState(status.st_size, status.st_mtime_ns, status.st_ino)


def _paths_of(file: TokenFile) -> dict[str, Path]:
    return dataset_files(file.name, with_loss_mask=file.loss_mask is not None)


def build_sources(
    data: DataConfig,
    *,
    seed: int,
    tokenizer: Vocabulary,
    seq_length: int | None = None,
    split: Split = "train",
    packing_versions: Mapping[str, int] | None = None,
) -> list[Source]:
    """Opens every source of a run, in the order of the configuration.

    Args:
        data: The configuration's section.
        seed: Seed of the run.
        tokenizer: Tokenizer of the run, which must be the one that encoded the data.
        seq_length: Input tokens per sample; ``data.seq_length`` by default.
        split: The split. A source without held-out documents has 0 validation samples.
        packing_versions: Version of the packing algorithm by source, as recorded by a resumed run;
            the latest version by default.

    Returns:
        One source for each entry of ``data.sources``.

    Raises:
        UserError: A dataset is missing, damaged, encoded with another tokenizer, or empty although
            it has weight. The message begins with the path in the configuration.
    """
    sources = []
    for name, config in data.sources.items():
        version = min((packing_versions or {}).get(name, ALGORITHM_VERSION), ALGORITHM_VERSION)
        source = _build_source(name, config, data, seed, tokenizer, seq_length, split, version)
        if source.num_samples == 0 and split == "train" and has_weight(data, name):
            reason = f"{source.num_tokens} tokens do not fill a sample of"
            if source.packing is not None and source.packing.num_without_loss:
                reason = f"{source.packing.num_without_loss} documents have no loss token in"
            raise UserError(
                f"data.sources.{name}: is empty ({reason} {seq_length or data.seq_length} "
                "tokens) and its weight is above 0: add data, or set its weight to 0"
            )
        sources.append(source)
    return sources


def token_epochs(data: DataConfig, sources: Sequence[Source]) -> dict[str, tuple[int, int]] | None:
    """Returns what weights count, and the samples, in an epoch; None if they count samples."""
    if data.schedule.count == "samples":
        return None
    return {source.name: (source.counted_tokens, source.num_samples) for source in sources}


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Prefixes the message of a `UserError` with its path in the configuration."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{label}: {error}") from error


def has_weight(data: DataConfig, name: str) -> bool:
    """Returns whether any knot of the schedule gives a source a positive weight."""
    given = [knot.weights for knot in data.schedule.knots]
    return any(not isinstance(part, str) and part.get(name, 0) > 0 for part in given)


def _build_source(
    name: str,
    config: SourceConfig,
    data: DataConfig,
    seed: int,
    tokenizer: Vocabulary,
    seq_length: int | None,
    split: Split,
    packing_version: int,
) -> Source:
    field, paths = "paths", config.paths
    holdout_every = None if config.validation_paths else data.holdout_every
    shares = parse_shares(data.split) if data.split and not config.validation_paths else None
    if split == "validation" and config.validation_paths:
        field, paths = "validation_paths", config.validation_paths
    elif shares is None and (split == "test" or (split == "validation" and not holdout_every)):
        paths = ()
    files, facts = [], []
    labels = [f"data.sources.{name}.{field}[{number}]" for number in range(len(paths))]
    for label, path in zip(labels, paths, strict=True):
        with _named(label):
            files.append(open_token_file(path, with_loss_mask=config.loss == "response"))
    # Without sidecars, facts are hashes of sample blocks, which are computed in threads.
    pool = ThreadPoolExecutor(_NUM_THREADS)
    try:
        pending = [pool.submit(dataset_facts, file) for file in files]
        for label, file, future in zip(labels, files, pending, strict=True):
            with _named(label):
                facts.append(future.result())
                check_tokenizer(file, facts[-1], tokenizer)
    finally:
        pool.shutdown(cancel_futures=True)
    shape = SampleShape(
        seq_length=seq_length or data.seq_length,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
        isolate=config.boundaries == "isolate",
    )
    label = f"data.sources.{name}"
    packing, runs = None, None
    if config.packing == "best_fit" and files:
        packing = cached_packing(
            files, facts, split, holdout_every, shape.seq_length, packing_version, shares
        )
        samples = make_packed_samples(label, files, packing, shape)
    else:
        runs = split_runs(files, split, holdout_every, shares)
        samples = make_windows(label, files, runs, shape, keep_tail=split != "train")
    # Everything that determines the tokens of an index. Loss and boundaries may change on resume.
    content: dict[str, Any] = {
        "datasets": facts,
        "seq_length": shape.seq_length,
        "holdout_every": holdout_every,
        "packing": None,
        "num_samples": samples.num_samples,
        **({} if shares is None else {"split": list(shares)}),
    }
    if config.packing == "best_fit":
        # Record version 1 if all versions give the same packing, so that the fingerprint is equal.
        content["packing"] = 1
        if packing is not None and packing.num_without_loss:
            content["packing"] = packing_version
            content["loss_masks"] = mask_hashes(files, facts)
    counted = None
    if split == "train" and data.schedule.count != "samples" and files:
        counted = samples.num_samples * shape.seq_length if packing is None else samples.num_tokens
        if data.schedule.count == "loss_tokens":
            key = packing_key(
                facts,
                packing_version,
                loss_masks=mask_hashes(files, facts),
                split=split,
                holdout_every=holdout_every,
                shares=shares,
                packing=config.packing,
                isolate=shape.isolate,
                shape=[shape.seq_length, samples.num_samples],
            )
            counted = cached_loss_tokens(
                files, key, partial(_loss_tokens, files, packing, runs, samples, shape)
            )
        if not counted and has_weight(data, name):
            raise UserError(
                f"{label}: has no loss tokens, so data.schedule.count {data.schedule.count} cannot "
                "give it a share; set its weight to 0, or set loss: all"
            )
    return Source(
        name,
        samples,
        seed=seed,
        split=split,
        files=files,
        facts=content,
        packing=packing,
        counted_tokens=counted,
    )


def _loss_tokens(
    files: Sequence[TokenFile],
    packing: Packing | None,
    runs: Runs | None,
    samples: Samples,
    shape: SampleShape,
) -> int:
    """Returns the loss tokens of an epoch."""
    if packing is not None:
        return packed_loss_tokens(files, packing, shape.seq_length)
    assert runs is not None, "samples are packed or windows"
    num_labels = samples.num_samples * shape.seq_length
    return window_loss_tokens(files, runs, num_labels, isolate=shape.isolate)

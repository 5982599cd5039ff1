"""Saves and loads a run's checkpoints: weights and optimizer state at any parallel layout.

`CheckpointSaver` saves while training continues. Training waits while this rank's tensors are
copied into host memory that is kept for this purpose; threads write the copy. With
``--no-async-save`` training also waits for the disk, and no copy is kept. One save is in progress
at a time. `load_checkpoint` and `load_weights` read a checkpoint back into a model and its
optimizer.

A checkpoint holds no state of random generators: after initialization nothing is random, because
dropout is 0 and the order of the data is a function of the seed.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch.distributed.checkpoint.filesystem import FileSystemReader
from typing_extensions import TypedDict

from megatron_chatflow.checkpoint import megatron
from megatron_chatflow.checkpoint import state as optimizer_state
from megatron_chatflow.checkpoint.direct_file import CHUNK_BYTES, DirectFile, FileHash
from megatron_chatflow.checkpoint.files import (
    carried_paths,
    find_damage,
    iteration_folder,
    raise_if_damaged,
    read_state,
)
from megatron_chatflow.checkpoint.index import read_index
from megatron_chatflow.checkpoint.layout import (
    FileImage,
    Plan,
    StoredObject,
    TensorShard,
    allow_padded_heads,
    assign_shards,
    build_file_image,
    unpadded_shards,
    unpadded_sizes_of,
)
from megatron_chatflow.checkpoint.remote import CheckpointUploader, UploadResult
from megatron_chatflow.checkpoint.state import LocalState
from megatron_chatflow.checkpoint.writer import (
    BackgroundSave,
    OnProgress,
    Publication,
    SaveReports,
    StagingBuffer,
    Write,
    draw_job_id,
    log_failure,
    page_aligned,
    reason,
)
from megatron_chatflow.config import RunConfig
from megatron_chatflow.config.fields import shorten
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks, data_parallel_group, run_on_all_ranks

logger = logging.getLogger(__name__)

_NUM_SLOTS = 3  # chunks in memory while a file is written without a copy of all of it
_COUNTS = ("iteration", "consumed_samples", "consumed_tokens")


@with_config(ConfigDict(strict=True, extra="allow"))
class _RecordedSource(TypedDict, total=False):
    """The fields of a source's fingerprint that a resume reads; earlier versions lack some."""

    datasets: list[dict[str, Any]] | None
    block_hash: list[dict[str, str]]
    packing: int | None
    seq_length: int | None
    holdout_every: int | None
    num_samples: int


_SOURCES = TypeAdapter(dict[str, _RecordedSource])


@dataclass(frozen=True)
class RunState:
    """The state of a run besides weights and optimizer, stored as ``state.json``."""

    iteration: int  # number of steps taken
    consumed_samples: int  # number of samples of the blend consumed
    consumed_tokens: int
    blend: dict[str, Any]
    # the schedule, with the number of samples per iteration that it began with
    schedule: dict[str, Any]
    sources: dict[str, Any]  # each source's fingerprint by name
    # ``type``, ``sha256``, ``vocab_size``, ``add_bos_token`` (whether the model's texts begin with
    # BOS; not recorded by earlier versions), and ``new_rows`` (the first and the end of the rows
    # that a growth of the vocabulary has added; only if there are any).
    tokenizer: dict[str, Any]
    model: dict[str, Any]  # the model's shape
    # the state of the loss guard; empty in checkpoints of runs without one
    guard: dict[str, Any] = field(default_factory=dict)
    # The seeds of each source's order by name, as pairs of the first epoch and the seed from there
    # on; empty in checkpoints of earlier versions.
    data_seeds: dict[str, Any] = field(default_factory=dict)
    # the stages of training, see `megatron_chatflow.training.stages`; empty for a run without them
    stages: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> "RunState":
        """Reads a checkpoint's state and checks the types of its fields."""
        state = read_state(checkpoint)
        for name, value in state.items():
            kind = int if name in _COUNTS else dict
            if name in cls.__dataclass_fields__ and type(value) is not kind:
                raise UserError(
                    f"{checkpoint / 'state.json'}: {name} is {shorten(value)}, not "
                    f"{'a number' if kind is int else 'an object'}; load another checkpoint"
                )
        try:
            _SOURCES.validate_python(state.get("sources", {}))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(key)[:40] for key in ("sources", *problem["loc"]))
            raise UserError(
                f"{checkpoint / 'state.json'}: {place}: {problem['msg'][:120]}; load another "
                "checkpoint"
            ) from error
        try:
            return cls(**state)
        except TypeError as error:
            raise UserError(
                f"{checkpoint / 'state.json'}: was written by an incompatible version ({error}); "
                "load another checkpoint"
            ) from None


def _nothing() -> None:
    pass


class CheckpointSaver:
    """Saves checkpoints of one run. Every rank has one and calls it at the same iterations.

    Args:
        root: The run's folder.
        config: The resolved configuration, stored with the weights.
        ranks: This process's place in the job.
        durable_iteration: The checkpoint that the run continues from; None if it starts fresh.
        carried: Small files that every checkpoint carries to an export, by name; written by rank 0.
        on_progress: Called while training waits for a save that makes progress.
        uploader: Copies published checkpoints to a store; on rank 0 only.
    """

    def __init__(
        self,
        root: Path,
        config: RunConfig,
        ranks: Ranks,
        *,
        durable_iteration: int | None,
        carried: Mapping[str, bytes] | None = None,
        on_progress: OnProgress = _nothing,
        uploader: CheckpointUploader | None = None,
    ) -> None:
        self._uploader = uploader
        self._carried = dict(carried or {})
        self._root = root
        self._config = config
        self._ranks = ranks
        self._durable = durable_iteration
        self._newest: Path | None = None
        self._on_progress = on_progress
        self._pending: BackgroundSave | None = None
        self._buffer = StagingBuffer(ranks.device)
        # A rank without enough memory for a copy writes at once, whatever the other ranks do.
        self._has_copy = config.checkpoint.async_save
        self._job = draw_job_id(ranks.device)
        self._num_saves = 0
        self._num_upload_waits = 0
        self._sent_plan: Plan | None = None
        self._plans: dict[int, Plan] = {}

    def prepare(
        self, chunks: list[Any], optimizer: Any, average: Sequence[LocalState] = ()
    ) -> None:
        """Allocates the memory that the first save copies into; call it after the first step.

        Otherwise the first save blocks longer, because its memory is touched for the first time.
        """
        if self._has_copy:
            image, _ = self._image(chunks, optimizer, average)
            self._has_copy = self._buffer.reserve(image.num_bytes)

    def save(
        self,
        state: RunState,
        chunks: list[Any],
        optimizer: Any,
        average: Sequence[LocalState] = (),
    ) -> bool:
        """Starts a save, after waiting for the previous one if it is still in progress.

        A save that fails (a full disk, a quota, a folder that cannot be written) is logged, leaves
        nothing behind, and leaves the previous checkpoint unchanged.

        Returns:
            Whether the save started; with ``--no-async-save``, whether the checkpoint is on disk.
        """
        begin = time.perf_counter()
        self.finish()
        final = iteration_folder(self._root, state.iteration)
        temporary = self._root / f".{final.name}.saving"
        staged: list[tuple[FileImage, bytes, Write]] = []

        def stage() -> None:
            if self._ranks.is_reporter:
                self._make_empty(temporary)
            image, common = self._image(chunks, optimizer, average)
            staged.append((image, common, self._copied(image, temporary)))

        if not self._all_succeed(stage, final, temporary):
            return False
        image, common, write = staged[0]
        if not self._has_copy:
            write = _written_now(write, self._on_progress)
        self._start(state, image, common, write, (final, temporary), begin)
        if self._ranks.is_reporter:
            logger.info(
                "saving %s: training was blocked for %.3f s (%.2f GB per rank)",
                final,
                time.perf_counter() - begin,
                image.num_bytes / 1e9,
            )
        return self._config.checkpoint.async_save or self.finish() == state.iteration

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._pending is not None and not self._pending.is_done

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint of this run, the same on every rank; None if there is none."""
        return self._newest

    def finish(self) -> int | None:
        """Waits for the save in progress; a collective.

        Returns the iteration of the newest checkpoint on disk; None if there is none.
        """
        pending = self._pending
        if pending is None:
            return self._durable
        if self.is_busy and self._ranks.is_reporter and self._has_copy:
            logger.info("waiting for iteration %d to be saved", pending.iteration)
        succeeded = pending.wait(self._on_progress)
        self._pending = None
        if _all_ranks_succeeded(succeeded, self._ranks.device):
            self._durable = pending.iteration
            self._newest = iteration_folder(self._root, pending.iteration)
        pending.clear()
        return self._durable

    def finish_uploads(self) -> str | None:
        """Waits until rank 0 has uploaded everything or failed; every rank calls it.

        A rank that exited earlier would make torchrun terminate the upload. There is no timeout of
        a collective.

        Returns what failed; None if nothing did, or on ranks that upload nothing.
        """
        if self._uploader is None and self._config.checkpoint.save_remote is None:
            return None
        self._num_upload_waits += 1
        reports = SaveReports(f"{self._job}/uploads/{self._num_upload_waits}")
        return wait_for_uploads(self._uploader, reports, self._on_progress)

    def take_upload_results(self) -> list[UploadResult]:
        """Returns the outcomes of this rank's uploads since the last call."""
        return [] if self._uploader is None else self._uploader.take_results()

    def close(self) -> None:
        """Waits until this rank has written its files, however the run ended, and frees memory."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending.wait(self._on_progress)
            self._pending = None
        if self._uploader is not None:
            self._uploader.close()
        self._buffer.release()

    def _image(
        self, chunks: list[Any], optimizer: Any, average: Sequence[LocalState]
    ) -> tuple[FileImage, bytes]:
        shards, objects, common = shards_to_save(chunks, optimizer, self._ranks, average)
        return build_file_image(f"__{self._ranks.process.rank}_0.distcp", shards, objects), common

    def _copied(self, image: FileImage, temporary: Path) -> Write:
        """Copies this rank's file into memory and returns a function that writes it."""
        name = image.plan["file"]
        self._has_copy = self._has_copy and self._buffer.reserve(image.num_bytes)
        if not self._has_copy:
            device = self._ranks.device
            return lambda progress: {
                name: _write_in_chunks(image, temporary / name, device, progress)
            }
        image.copy(0, image.num_bytes, self._buffer.tensor())
        if self._ranks.is_cuda:
            torch.cuda.synchronize(self._ranks.device)
        data, num_bytes = self._buffer.bytes(), image.num_bytes
        return lambda progress: {name: _write_whole(data, num_bytes, temporary / name, progress)}

    def _start(
        self,
        state: RunState,
        image: FileImage,
        common: bytes,
        write: Write,
        folders: tuple[Path, Path],
        begin: float,
    ) -> None:
        final, temporary = folders
        self._num_saves += 1
        plan = image.plan if image.plan != self._sent_plan else None
        self._sent_plan = image.plan
        process = self._ranks.process
        reports = SaveReports(f"{self._job}/{self._num_saves}")
        self._pending = BackgroundSave(state.iteration, write, reports, process.rank, plan)
        if not self._ranks.is_reporter:
            return
        settings = self._config.checkpoint
        publication = Publication(
            root=self._root,
            temporary=temporary,
            final=final,
            iteration=state.iteration,
            small_files={
                "common.pt": common,
                "metadata.json": megatron.format_file(),
                "config.yaml": self._config.to_yaml().encode(),
                "state.json": json.dumps(asdict(state), indent=1).encode(),
                **carried_paths(self._carried),
            },
            retain=settings.save_retain,
            keep_every=settings.save_keep_every,
            uploader=self._uploader,
        )
        self._pending.publish(publication, process.world_size, self._plans, begin)

    def _make_empty(self, folder: Path) -> None:
        """Creates the folder, after removing what earlier jobs left of their saves."""
        with contextlib.suppress(OSError):
            for left in [*self._root.glob(".iter_*.saving"), *self._root.glob(".iter_*.removed")]:
                shutil.rmtree(left, ignore_errors=True)
        folder.mkdir(parents=True)

    def _all_succeed(self, step: Callable[[], None], final: Path, temporary: Path) -> bool:
        """Runs a step of a save on every rank; if it fails on one, the save is removed."""
        error: BaseException | None = None
        try:
            step()
        except Exception as caught:
            error = caught
        if _all_ranks_succeeded(error is None, self._ranks.device):
            return True
        if error is not None:
            log_failure(final, error)
        if self._ranks.is_reporter:
            shutil.rmtree(temporary, ignore_errors=True)
        return False


def wait_for_uploads(
    uploader: CheckpointUploader | None, reports: SaveReports, on_progress: OnProgress
) -> str | None:
    """Waits until the rank with the uploader has finished; see `CheckpointUploader.finish`."""
    if uploader is None:
        reports.wait_for_end(on_progress, lambda: False)
        return None
    try:
        return uploader.finish(on_progress)
    finally:
        reports.end()


def _written_now(write: Write, on_progress: OnProgress) -> Write:
    """Writes while training waits; returns a function with the same result or error."""
    done: Future[dict[str, FileHash]] = Future()
    try:
        done.set_result(write(on_progress))
    except Exception as error:
        done.set_exception(error)
    return lambda _: done.result()


def _write_whole(data: memoryview, num_bytes: int, path: Path, progress: OnProgress) -> FileHash:
    with contextlib.closing(DirectFile(path, num_bytes)) as file:
        chunks = [
            file.submit(begin, data[begin : begin + CHUNK_BYTES])
            for begin in range(0, num_bytes, CHUNK_BYTES)
        ]
        for chunk in chunks:
            chunk.result()
            progress()
        return file.finish()


def _write_in_chunks(
    image: FileImage, path: Path, device: torch.device, progress: OnProgress
) -> FileHash:
    """Writes a file directly from its tensors, a few chunks at a time."""
    slots = [page_aligned(CHUNK_BYTES) for _ in range(_NUM_SLOTS)]
    with contextlib.closing(DirectFile(path, image.num_bytes)) as file:
        waiting: list[Any] = [None] * _NUM_SLOTS
        for number, begin in enumerate(range(0, image.num_bytes, CHUNK_BYTES)):
            slot = number % _NUM_SLOTS
            if waiting[slot] is not None:
                waiting[slot].result()
            memory, tensor = slots[slot]
            image.copy(begin, min(begin + CHUNK_BYTES, image.num_bytes), tensor)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            waiting[slot] = file.submit(begin, memoryview(memory)[:CHUNK_BYTES])
            progress()
        for chunk in waiting:
            if chunk is not None:
                chunk.result()
        return file.finish()


def shards_to_save(
    chunks: list[Any], optimizer: Any, ranks: Ranks, average: Sequence[LocalState] = ()
) -> tuple[list[TensorShard], list[StoredObject], bytes]:
    """Returns the weights and optimizer state that this rank writes, without copying anything.

    Shards that data-parallel ranks replicate are divided among them. The content of ``common.pt``,
    the last value, is the same on every rank.
    """
    with device_mode(ranks.device):
        bare = _unwrap(chunks)
        model = _model_state(bare)
        parts = megatron.parameter_shards(model)
        cut: list[TensorShard] = []
        alike, objects, common = megatron.saved_shards(
            model, {"optimizer": optimizer_state.common_state(optimizer)}
        )
        for held in [*optimizer_state.local_states(optimizer), *average]:
            to_save = [part for part in parts[held.parameter] if part.is_main]
            (cut if held.is_sharded else alike).extend(optimizer_state.state_shards(held, to_save))
            if is_float8tensor(held.parameter) and optimizer_state.MASTER in held.tensors:
                cut.extend(optimizer_state.weight_shards(held, to_save))
    unpadded_sizes = unpadded_sizes_of(bare)
    group = data_parallel_group(with_context_parallel=True)
    mine = assign_shards(unpadded_shards(alike, unpadded_sizes), group.rank(), group.size())
    return [*mine, *unpadded_shards(cut, unpadded_sizes)], objects, common


def load_checkpoint(
    checkpoint: Path,
    chunks: list[Any],
    optimizer: Any,
    ranks: Ranks,
    reader: FileSystemReader | None = None,
    average: Sequence[LocalState] = (),
) -> bool:
    """Loads weights and the state of the plain or the distributed optimizer; a collective.

    Args:
        checkpoint: An ``iter_`` folder.
        chunks: Model chunks, with or without DDP wrappers.
        optimizer: megatron-core's optimizer.
        ranks: This process's place in the job.
        reader: The reader to use; None reads the folder's files unchanged.
        average: The average of the weights to fill, if the checkpoint holds one.

    Returns:
        Whether the checkpoint holds an average of the weights.

    Raises:
        UserError: Raised on every rank if one rank cannot read its shards.
    """
    bare = _unwrap(chunks)
    with device_mode(ranks.device):
        common = _load_model(bare, checkpoint, reader)
        layout = parameter_layout(bare)
        state = common.get("optimizer")
        return run_on_all_ranks(
            lambda: optimizer_state.load(optimizer, layout, state, checkpoint, reader, average)
        )


def load_weights(
    checkpoint: Path,
    chunks: list[Any],
    ranks: Ranks,
    reader: FileSystemReader | None = None,
    optimizer: Any = None,
) -> None:
    """Loads only the model's weights, as `load_checkpoint` does; a collective.

    The master weights of ``optimizer`` are set to the checkpoint's at full precision.
    """
    bare = _unwrap(chunks)
    with device_mode(ranks.device):
        _load_model(bare, checkpoint, reader)
        if optimizer is not None:
            layout = parameter_layout(bare)
            run_on_all_ranks(
                lambda: optimizer_state.load_master_weights(optimizer, layout, checkpoint, reader)
            )


def _load_model(
    chunks: list[Any], checkpoint: Path, reader: FileSystemReader | None
) -> dict[str, Any]:
    """Loads the weights and returns the content of ``common.pt``."""
    read_index(checkpoint)
    try:
        state = {
            name: megatron.without_objects(part) for name, part in _model_state(chunks).items()
        }
        allow_padded_heads(state, unpadded_sizes_of(chunks))
        loaded = megatron.load_sharded(state, checkpoint, reader)
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
            _load_chunk(chunk, loaded[name])
    except (Exception, megatron.CheckpointException) as error:
        line = _reason(error)
        if line.startswith(str(checkpoint)):
            raise UserError(line) from error
        raise UserError(
            f"{checkpoint}: cannot be loaded: {line}; load another checkpoint"
        ) from error
    return loaded


def _load_chunk(chunk: Any, state: dict[str, torch.Tensor]) -> None:
    """Loads a chunk's tensors, all of them, and leaves what layers keep beside them as it is."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.endswith("._extra_state"))]
    if wrong:
        raise KeyError(f"the model and its state differ in {wrong[0]}")


def parameter_layout(chunks: list[Any]) -> optimizer_state.Layout:
    """Returns the positions of this rank's parameters in the whole model."""
    bare = _unwrap(chunks)
    parts = megatron.parameter_shards(_model_state(bare))
    return optimizer_state.Layout(parts, unpadded_sizes_of(bare))


def _model_state(chunks: list[Any]) -> dict[str, Any]:
    """Returns megatron-core's sharded state dictionary of this rank's weights."""
    return {
        name: chunk.sharded_state_dict()
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }


def _chunk_names(chunks: list[Any]) -> list[str]:
    """Returns the chunks' keys in the state dictionary, the same as Megatron's."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _unwrap(chunks: list[Any]) -> list[Any]:
    """Returns model chunks without their DDP wrappers."""
    return [getattr(chunk, "module", chunk) for chunk in chunks]


def _reason(error: BaseException) -> str:
    """Returns the cause of an error in one line, without torch's wrapping."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return str(error) if isinstance(error, UserError) else reason(error)


def _all_ranks_succeeded(succeeded: bool, device: torch.device) -> bool:
    """Returns whether every rank succeeded; a collective."""
    flag = torch.tensor([int(succeeded)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def verify_checkpoint(checkpoint: Path, ranks: Ranks) -> None:
    """Compares the hashes of all files with the recorded ones, divided among ranks; a collective.

    Raises `UserError` on every rank, naming all files that differ from what was saved.
    """
    world_size = ranks.process.world_size
    found = find_damage(checkpoint, part=ranks.process.rank, num_parts=world_size)
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, found)
    raise_if_damaged(checkpoint, [line for lines in gathered for line in lines])

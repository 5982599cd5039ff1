"""Saves a run's checkpoints while it trains on.

In: the model's chunks, the optimizer and a `RunState`, at the iterations that are due. Out: folders
``iter_0000100/`` that appear whole or not at all, and ``latest_checkpointed_iteration.txt``, which
moves only then. Training waits while its tensors are copied into host memory that is kept for it;
threads write the copy. With ``--no-async-save`` training waits for the disk too, and no copy is
kept. One save is under way at a time; the next one waits for it.

A run's checkpoints: weights and optimizer state at any parallel layout, and the run's own state.

In: the model's chunks and the optimizer, and a checkpoint's folder. Out: their state as shards to
save, or read back into them; `saver` writes. Nothing random is drawn after initialisation (dropout
is 0 and the data's order is a function of the seed), so no generator's state is kept.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch.distributed.checkpoint.filesystem import FileSystemReader
from typing_extensions import TypedDict

from megatron_chatflow.checkpoint import megatron
from megatron_chatflow.checkpoint import state as optimizer_state
from megatron_chatflow.checkpoint.direct_file import CHUNK_BYTES, DirectFile, FileHash
from megatron_chatflow.checkpoint.files import (
    carried_paths,
    damage,
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

_COUNTS = ("iteration", "consumed_samples", "consumed_tokens")


@with_config(ConfigDict(strict=True, extra="allow"))
class _RecordedSource(TypedDict, total=False):
    """What a resume reads of a source's fingerprint; versions recorded more and more of it."""

    datasets: list[dict[str, Any]] | None
    block_hash: list[dict[str, str]]
    packing: int | None
    seq_length: int | None
    holdout_every: int | None
    num_samples: int


_SOURCES = TypeAdapter(dict[str, _RecordedSource])


@dataclass(frozen=True)
class RunState:
    """What a run must know to go on, besides weights and optimizer.

    Attributes:
        iteration: Steps taken.
        consumed_samples: Samples of the blend consumed.
        consumed_tokens: The same in tokens.
        blend: The blend's state.
        schedule: The schedule, with the number of samples an iteration that it began with.
        sources: Each source's fingerprint by name.
        tokenizer: ``type``, ``sha256``, ``vocab_size``, and ``add_bos_token`` (whether the model's
            texts begin with BOS; earlier versions did not record it).
        model: The model's shape.
        guard: What judging the next steps takes; empty in checkpoints that had none.
        data_seeds: The seeds of each source's order by name: pairs of the first epoch and the seed
            from there on; empty in checkpoints that had none.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    blend: dict[str, Any]
    schedule: dict[str, Any]
    sources: dict[str, Any]
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)
    data_seeds: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> "RunState":
        """Reads a checkpoint's state.

        Raises:
            UserError: The folder holds none, or it lacks a part, or one is of the wrong type.
        """
        state = read_state(checkpoint)
        for name, value in state.items():
            kind = int if name in _COUNTS else dict
            if name in cls.__dataclass_fields__ and type(value) is not kind:
                raise UserError(
                    f"{checkpoint / 'state.json'}: {name} is {shorten(value)} and no "
                    f"{'number' if kind is int else 'object'}; load another checkpoint"
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
                f"{checkpoint / 'state.json'}: is of another version ({error}); load another "
                "checkpoint"
            ) from None


def _model_state(chunks: list[Any]) -> dict[str, Any]:
    """The weights, divided as they lie on this rank."""
    return {
        name: chunk.sharded_state_dict()
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }


def shards_to_save(
    chunks: list[Any], optimizer: Any, ranks: Ranks
) -> tuple[list[TensorShard], list[StoredObject], bytes]:
    """What this rank writes: weights and optimizer state; nothing is gathered or copied.

    What data-parallel ranks hold alike is shared out among them.

    Args:
        chunks: Model chunks, with or without gradient buffers around them.
        optimizer: megatron-core's.
        ranks: This process's place.

    Returns:
        Pieces of tensors, small objects, and what is the same on every rank as ``common.pt``
        holds it.
    """
    with device_mode(ranks.device):
        bare = unwrapped(chunks)
        model = _model_state(bare)
        parts = megatron.parameter_shards(model)
        cut: list[TensorShard] = []
        alike, objects, common = megatron.saved_shards(
            model, {"optimizer": optimizer_state.common_state(optimizer)}
        )
        for held in optimizer_state.local_states(optimizer):
            to_save = [part for part in parts[held.parameter] if part.is_main]
            (cut if held.is_sharded else alike).extend(optimizer_state.state_shards(held, to_save))
    unpadded_sizes = unpadded_sizes_of(bare)
    group = data_parallel_group(with_context_parallel=True)
    mine = assign_shards(unpadded_shards(alike, unpadded_sizes), group.rank(), group.size())
    return [*mine, *unpadded_shards(cut, unpadded_sizes)], objects, common


def _chunk_names(chunks: list[Any]) -> list[str]:
    """Where each chunk stands in the state, as in Megatron; tensors go by names of their own."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _take_weights(chunks: list[Any], loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name])


def unwrapped(chunks: list[Any]) -> list[Any]:
    """Model chunks without the gradient buffers around them."""
    return [getattr(chunk, "module", chunk) for chunk in chunks]


def all_ranks_succeeded(is_fine: bool, device: torch.device) -> bool:
    """Whether all is fine on every rank; every rank calls it."""
    flag = torch.tensor([int(is_fine)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def _reason(error: BaseException) -> str:
    """What the system said, under torch's wrapping."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return str(error) if isinstance(error, UserError) else reason(error)


def _load_model(
    chunks: list[Any], checkpoint: Path, reader: FileSystemReader | None
) -> dict[str, Any]:
    """Fills the weights; returns what is the same on every rank."""
    read_index(checkpoint)
    try:
        state = _model_state(chunks)
        allow_padded_heads(state, unpadded_sizes_of(chunks))
        loaded = megatron.load_sharded(state, checkpoint, reader)
        _take_weights(chunks, loaded)
    except (Exception, megatron.CheckpointException) as error:
        line = _reason(error)
        if line.startswith(str(checkpoint)):
            raise UserError(line) from error
        raise UserError(
            f"{checkpoint}: cannot be loaded: {line}; load another checkpoint"
        ) from error
    return loaded


def load_weights(
    checkpoint: Path,
    chunks: list[Any],
    ranks: Ranks,
    reader: FileSystemReader | None = None,
    optimizer: Any = None,
) -> None:
    """Reads the model's weights alone, at whatever layout they were saved; every rank calls it.

    Args:
        checkpoint: An ``iter_`` folder.
        chunks: Model chunks, with or without gradient buffers around them.
        ranks: This process's place.
        reader: Reads it; None for what lies there as it is.
        optimizer: megatron-core's, whose master weights become the checkpoint's, unrounded.

    Raises:
        UserError: On every rank, if one cannot read its part.
    """
    bare = unwrapped(chunks)
    with device_mode(ranks.device):
        _load_model(bare, checkpoint, reader)
        if optimizer is not None:
            layout = _layout(bare)
            run_on_all_ranks(
                lambda: optimizer_state.load_master_weights(optimizer, layout, checkpoint, reader)
            )


def _layout(bare: list[Any]) -> optimizer_state.Layout:
    parts = megatron.parameter_shards(_model_state(bare))
    return optimizer_state.Layout(parts, unpadded_sizes_of(bare))


def load_checkpoint(
    checkpoint: Path,
    chunks: list[Any],
    optimizer: Any,
    ranks: Ranks,
    reader: FileSystemReader | None = None,
) -> None:
    """Reads weights and optimizer state, of the plain or the distributed one; every rank calls it.

    Raises:
        UserError: On every rank, if one cannot read its part.
    """
    bare = unwrapped(chunks)
    with device_mode(ranks.device):
        common = _load_model(bare, checkpoint, reader)
        layout = _layout(bare)
        state = common.get("optimizer")
        run_on_all_ranks(lambda: optimizer_state.load(optimizer, layout, state, checkpoint, reader))


def verify_checkpoint(checkpoint: Path, ranks: Ranks) -> None:
    """Reads every file again and compares hashes; every rank calls it and reads its share.

    Raises:
        UserError: A file is not what was saved, on every rank with the names of all such files.
    """
    world_size = ranks.process.world_size
    found = damage(checkpoint, part=ranks.process.rank, num_parts=world_size)
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, found)
    raise_if_damaged(checkpoint, [line for lines in gathered for line in lines])


logger = logging.getLogger(__name__)

_NUM_SLOTS = 3  # chunks in memory while a file is written without a copy of it


def _nothing() -> None:
    pass


class CheckpointSaver:
    """Saves checkpoints of one run; every rank has one and calls it at the same iterations."""

    def __init__(
        self,
        root: Path,
        config: RunConfig,
        ranks: Ranks,
        *,
        durable_iteration: int | None,
        carried: Mapping[str, bytes] | None = None,
        on_progress: OnProgress = _nothing,
    ) -> None:
        """Takes the run's folder.

        Args:
            root: The run's folder.
            config: Resolved configuration, stored beside the weights.
            ranks: This process's place.
            durable_iteration: The checkpoint that the run goes on from; None if it begins.
            carried: Small files that every checkpoint carries to an export, by name; rank 0 writes
                them.
            on_progress: Called while training waits for a save that gets on.
        """
        self._carried = dict(carried or {})
        self._root = root
        self._config = config
        self._ranks = ranks
        self._durable = durable_iteration
        self._newest: Path | None = None
        self._on_progress = on_progress
        self._pending: BackgroundSave | None = None
        self._buffer = StagingBuffer(ranks.device)
        # A rank without the memory for it writes at once; that is its own affair.
        self._has_copy = config.checkpoint.async_save
        self._job = draw_job_id(ranks.device)
        self._num_saves = 0
        self._sent_plan: Plan | None = None
        self._plans: dict[int, Plan] = {}

    def prepare(self, chunks: list[Any], optimizer: Any) -> None:
        """Makes the memory ready that the first save copies into; after the first step.

        Without it the first save blocks longer, while its memory is touched for the first time.
        """
        if self._has_copy:
            image, _ = self._image(chunks, optimizer)
            self._has_copy = self._buffer.reserve(image.num_bytes)

    def save(self, state: RunState, chunks: list[Any], optimizer: Any) -> bool:
        """Begins a save; waits for the one before, if that is still under way.

        A save that fails (a full disk, a quota, a folder that cannot be written) is logged, leaves
        nothing behind, and leaves the previous checkpoint as it was.

        Args:
            state: The run's own state.
            chunks: Model chunks, with or without gradient buffers around them.
            optimizer: megatron-core's optimizer.

        Returns:
            Whether it began; with ``--no-async-save``, whether the checkpoint is on the disk.
        """
        begin = time.perf_counter()
        self.finish()
        final = iteration_folder(self._root, state.iteration)
        beside = self._root / f".{final.name}.saving"
        staged: list[tuple[FileImage, bytes, Write]] = []

        def stage() -> None:
            if self._ranks.is_reporter:
                self._make_empty(beside)
            image, common = self._image(chunks, optimizer)
            staged.append((image, common, self._copied(image, beside)))

        if not self._all_succeed(stage, final, beside):
            return False
        image, common, write = staged[0]
        if not self._has_copy:
            write = _written_now(write, self._on_progress)
        self._start(state, image, common, write, (final, beside), begin)
        if self._ranks.is_reporter:
            logger.info(
                "saving %s: training waited %.3f s for %.2f GB a rank",
                final,
                time.perf_counter() - begin,
                image.num_bytes / 1e9,
            )
        return self._config.checkpoint.async_save or self.finish() == state.iteration

    @property
    def is_busy(self) -> bool:
        """Whether this rank still writes a checkpoint."""
        return self._pending is not None and not self._pending.is_done

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that this run has saved, the same on every rank; None if none."""
        return self._newest

    def finish(self) -> int | None:
        """Waits for the save under way; every rank calls it.

        Returns:
            The iteration of the newest checkpoint that is on the disk; None if there is none.
        """
        pending = self._pending
        if pending is None:
            return self._durable
        if self.is_busy and self._ranks.is_reporter and self._has_copy:
            logger.info("waiting for the checkpoint of iteration %d", pending.iteration)
        is_fine = pending.wait(self._on_progress)
        self._pending = None
        if all_ranks_succeeded(is_fine, self._ranks.device):
            self._durable = pending.iteration
            self._newest = iteration_folder(self._root, pending.iteration)
        pending.forget()
        return self._durable

    def close(self) -> None:
        """Waits for what this rank still writes, whatever ended the run, and lets memory go."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending.wait(self._on_progress)
            self._pending = None
        self._buffer.release()

    def _image(self, chunks: list[Any], optimizer: Any) -> tuple[FileImage, bytes]:
        shards, objects, common = shards_to_save(chunks, optimizer, self._ranks)
        return build_file_image(f"__{self._ranks.process.rank}_0.distcp", shards, objects), common

    def _copied(self, image: FileImage, beside: Path) -> Write:
        """Copies this rank's file into memory; returns what writes it."""
        name = image.plan["file"]
        self._has_copy = self._has_copy and self._buffer.reserve(image.num_bytes)
        if not self._has_copy:
            device = self._ranks.device
            return lambda progress: {name: _write_in_chunks(image, beside / name, device, progress)}
        image.copy(0, image.num_bytes, self._buffer.tensor())
        if self._ranks.is_cuda:
            torch.cuda.synchronize(self._ranks.device)
        data, num_bytes = self._buffer.bytes(), image.num_bytes
        return lambda progress: {name: _write_whole(data, num_bytes, beside / name, progress)}

    def _start(
        self,
        state: RunState,
        image: FileImage,
        common: bytes,
        write: Write,
        folders: tuple[Path, Path],
        begin: float,
    ) -> None:
        final, beside = folders
        self._num_saves += 1
        plan = image.plan if image.plan != self._sent_plan else None
        self._sent_plan = image.plan
        process = self._ranks.process
        box = SaveReports(f"{self._job}/{self._num_saves}")
        self._pending = BackgroundSave(state.iteration, write, box, process.rank, plan)
        if not self._ranks.is_reporter:
            return
        settings = self._config.checkpoint
        publication = Publication(
            root=self._root,
            beside=beside,
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
        )
        self._pending.publish(publication, process.world_size, self._plans, begin)

    def _make_empty(self, folder: Path) -> None:
        """Makes the folder; what an earlier job left of its saves goes, it takes up room."""
        with contextlib.suppress(OSError):
            for left in [*self._root.glob(".iter_*.saving"), *self._root.glob(".iter_*.removed")]:
                shutil.rmtree(left, ignore_errors=True)
        folder.mkdir(parents=True)

    def _all_succeed(self, step: Callable[[], None], final: Path, beside: Path) -> bool:
        """Runs a step of a save on every rank; if one fails, nothing is left of it."""
        error: BaseException | None = None
        try:
            step()
        except Exception as caught:
            error = caught
        if all_ranks_succeeded(error is None, self._ranks.device):
            return True
        if error is not None:
            log_failure(final, error)
        if self._ranks.is_reporter:
            shutil.rmtree(beside, ignore_errors=True)
        return False


def _written_now(write: Write, on_progress: OnProgress) -> Write:
    """Writes while training waits; returns what tells of it, or fails as the write did."""
    try:
        hashes = write(on_progress)
    except Exception as caught:
        error = caught

        def fail(_: OnProgress) -> dict[str, FileHash]:
            raise error

        return fail
    return lambda _: hashes


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
    """Writes a file from its tensors through a few chunks of memory."""
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

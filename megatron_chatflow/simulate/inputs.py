"""The inputs of a simulated run: the configuration's own files, or generated ones where they lack.

Values do not matter to a simulation, but the data path runs as in training. So what is missing is
written to a temporary folder: a SentencePiece model of the configured vocabulary, and one dataset
of random tokens that stands for every missing one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.config import RunConfig
from megatron_chatflow.config.shape import num_model_chunks
from megatron_chatflow.config.validation import to_plain
from megatron_chatflow.data.indexed import (
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    optimal_dtype,
)
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.tokenizer import load_tokenizer

VOCAB_SIZE = 32_000
NUM_STEPS = 2
_NEVER = 1_000_000_000
_CONTROL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class SimulatedInputs:
    """What the simulated ranks run.

    Attributes:
        config: The configuration that they run.
        vocab_size: Size of the vocabulary.
        num_micro_batches: Micro-batches of a step on each rank, of the configuration.
        num_executed: Those of them that are executed.
        notes: What differs from the configuration, for the report.
    """

    config: RunConfig
    vocab_size: int
    num_micro_batches: int
    num_executed: int
    notes: tuple[str, ...]


def missing_files(config: RunConfig) -> list[str]:
    """Returns the tokenizer and the datasets of a configuration that do not exist."""
    tokenizer = config.tokenizer.tokenizer_model
    missing = [] if Path(tokenizer).exists() else [str(tokenizer)]
    for source in config.data.sources.values():
        missing += [str(p) for p in (*source.paths, *source.validation_paths) if not _exists(p)]
    return missing


def _exists(prefix: Path | str) -> bool:
    return bin_path(prefix).exists() and idx_path(prefix).exists()


def prepare(config: RunConfig, world_size: int, folder: Path) -> SimulatedInputs:
    """Returns the configuration that simulated ranks run, and writes what it lacks.

    It makes two steps of as many micro-batches as a pipeline needs to fill, preceded by a
    validation. It starts from random weights and saves nothing.

    Args:
        config: The user's configuration.
        world_size: Number of ranks.
        folder: A folder for generated files.
    """
    values: dict[str, Any] = to_plain(config)
    train = config.train
    data_parallel = world_size // config.model_parallel_size
    share = data_parallel * train.micro_batch_size
    num_micro_batches = train.global_batch_size // share
    stages = config.parallel.pipeline_model_parallel_size
    # These fill a pipeline. Interleaved stages take micro-batches in groups of that size, and one
    # group would all be forward passes before the first backward pass.
    is_interleaved = num_model_chunks(config.model, config.parallel) > 1
    num_executed = min(num_micro_batches, 2 * stages if is_interleaved else stages + 1)
    values["train"] |= {
        "global_batch_size": share * num_executed,
        "rampup_batch_size": None,
        "exit_interval": NUM_STEPS,
        "exit_duration_in_mins": None,
        "eval_interval": _NEVER if train.validates else train.eval_interval,
        "eval_iters": min(train.eval_iters, 1),
        "choice_questions": None,
        "choice_interval": None,
        "eval_probes": [],
        "probe_interval": None,
    }
    values["checkpoint"] = {"from_scratch": True}
    values["logging"] = {"log_straggler": config.logging.log_straggler}
    values["faults"] = {}
    values["data"] |= {"num_prefetch": 1, "data_verify": False}
    notes = ["starts from random weights, and saves no checkpoints"]
    if train.stages:
        values["train"]["stages"] = []
        notes.append("trains everything: stages of training are left out")
    if config.data.schedule.controller is not None:
        values["data"]["schedule"]["controller"] = None
        notes.append("has the weights of the knot: the controller is left out")
    if num_executed < num_micro_batches:
        notes.append(
            f"executes {num_executed} of the {num_micro_batches} micro-batches of a step; FLOPs "
            "and messages are scaled to the whole step"
        )
    vocab_size = _fill_in(config, values, share, folder, notes)
    _validate_fewer(values, notes)
    return SimulatedInputs(
        RunConfig.from_dict(values), vocab_size, num_micro_batches, num_executed, tuple(notes)
    )


def _fill_in(
    config: RunConfig, values: dict[str, Any], share: int, folder: Path, notes: list[str]
) -> int:
    """Generates what is missing, changes the paths, and returns the vocabulary's size."""
    tokenizer = Path(config.tokenizer.tokenizer_model)
    has_tokenizer = tokenizer.exists()
    if has_tokenizer:
        vocab_size = load_tokenizer(tokenizer, config.tokenizer.tokenizer_type).vocab_size
    else:
        vocab_size = config.model.vocab_size or VOCAB_SIZE
        model = folder / "tokenizer.model"
        write_tokenizer(model, vocab_size)
        values["tokenizer"] = {"tokenizer_model": str(model)}
        notes.append(
            f"{tokenizer} is missing: a generated tokenizer of {vocab_size:,} pieces and "
            "generated tokens take its place"
        )
    # Without the tokenizer, ids of existing datasets may lie outside of the vocabulary.
    replaced = [
        name
        for name, source in config.data.sources.items()
        if not has_tokenizer or not all(map(_exists, (*source.paths, *source.validation_paths)))
    ]
    if replaced:
        length = config.data.seq_length
        prefix = folder / "generated_text_document"
        write_dataset(prefix, vocab_size, length, max(2 * share, 16))
        for name in replaced:
            source = values["data"]["sources"][name]
            source |= {"paths": [str(prefix)], "max_epochs": None}
            if config.train.validates:
                source["validation_paths"] = [str(prefix)]
        if len(replaced) == len(config.data.sources):
            values["data"] |= {"holdout_every": None, "split": None}
        if has_tokenizer:
            notes.append(f"{', '.join(replaced)}: files are missing; generated tokens are used")
    return max(vocab_size, config.model.vocab_size or 0)


def _validate_fewer(values: dict[str, Any], notes: list[str]) -> None:
    """Keeps one validated source for each kind of attention, as their work is the same."""
    kept: dict[str, str] = {}
    left_out = []
    for name, source in values["data"]["sources"].items():
        if source["validation_paths"]:
            if kept.setdefault(source["boundaries"], name) != name:
                source["validation_paths"] = []
                left_out.append(name)
    if left_out:
        notes.append(f"validates {' and '.join(kept.values())} only; others do the same work")


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Writes a SentencePiece model with LLaMA's control pieces, bytes and made-up pieces."""
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for number in range(vocab_size):
        piece = model.pieces.add()
        piece.score = -float(number)
        if number < len(_CONTROL):
            piece.piece = _CONTROL[number]
            piece.type = kinds.UNKNOWN if number == 0 else kinds.CONTROL
        elif number < len(_CONTROL) + 256:
            piece.piece = f"<0x{number - len(_CONTROL):02X}>"
            piece.type = kinds.BYTE
        else:
            piece.piece = f"\u2581{number}"
            piece.type = kinds.NORMAL
    spec = model.trainer_spec
    spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    spec.vocab_size, spec.byte_fallback = vocab_size, True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    path.write_bytes(model.SerializeToString())


def write_dataset(prefix: Path, vocab_size: int, seq_length: int, num_samples: int) -> None:
    """Writes random documents of an eighth of a sample to a whole one, and their loss mask."""
    random = np.random.default_rng(0)
    dtype = optimal_dtype(vocab_size)
    num_tokens = (num_samples + 1) * (seq_length + 1)
    shortest = max(1, seq_length // 8)
    lengths = random.integers(shortest, seq_length, 1 + num_tokens // shortest, endpoint=True)
    lengths = lengths[: 1 + int(np.searchsorted(np.cumsum(lengths), num_tokens))]
    tokens = random.integers(0, vocab_size, int(lengths.sum())).astype(dtype)
    for target, content in ((prefix, tokens), (loss_mask_prefix(prefix), np.ones_like(tokens))):
        kind = dtype if target == prefix else np.dtype(np.uint8)
        writer = IndexedDatasetWriter(target, kind)
        writer.add_documents(content.astype(kind), lengths.astype(np.int32))
        writer.finalize()

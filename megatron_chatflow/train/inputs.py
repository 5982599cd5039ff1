"""What a run reads, opened and checked against one another before anything is built.

In: a resolved configuration. Out: `RunInputs`: tokenizer, sources, blend, and the checkpoint to go
on from. It needs neither a GPU nor another rank, so a dry run does just this.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_chatflow.checkpoint.convert_shape import LlamaShape
from megatron_chatflow.checkpoint.files import resolve_checkpoint
from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.config import RunConfig, to_plain
from megatron_chatflow.data.blend import Blend
from megatron_chatflow.data.plan import check_epochs
from megatron_chatflow.data.schedule import Schedule
from megatron_chatflow.data.source import Source, build_sources
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """The opened inputs of a run.

    Attributes:
        tokenizer: Of text and model.
        vocab_size: The model's, before padding.
        sources: Training sources in the schedule's order.
        validation_sources: Held-out samples of each; none where nothing is validated.
        blend: From the beginning, or as the checkpoint left it.
        state: The run's state before its first iteration.
        checkpoint: Where weights come from; None for fresh ones.
        resumed: The checkpoint's state; None unless the run goes on from it.
    """

    tokenizer: Tokenizer
    vocab_size: int
    sources: list[Source]
    validation_sources: list[Source]
    blend: Blend
    state: RunState
    checkpoint: Path | None
    resumed: RunState | None


def open_inputs(config: RunConfig) -> RunInputs:
    """Opens and checks everything that a run reads.

    Raises:
        UserError: Something is missing or damaged, or data, tokenizer, model and checkpoint do not
            fit together.
    """
    tokenizer = load_tokenizer(config.tokenizer.tokenizer_model, config.tokenizer.tokenizer_type)
    vocab_size = model_vocab_size(config, tokenizer)
    sources = build_sources(config.data, seed=config.train.seed, tokenizer=tokenizer)
    held_out = []
    if config.train.eval_interval is not None:
        held_out = build_sources(
            config.data, seed=config.train.seed, tokenizer=tokenizer, split="validation"
        )
    state = initial_state(config, tokenizer, sources, vocab_size)
    checkpoint = _checkpoint_to_load(config)
    resumed = None
    if checkpoint is not None:
        saved = RunState.read(checkpoint.folder)
        _refuse_other_model(saved, state, checkpoint.folder)
        if not checkpoint.weights_only:
            if "samples_per_iteration" not in saved.schedule:
                raise UserError(
                    f"checkpoint.load: {checkpoint.folder} holds weights alone and no run to go on "
                    "with; add --finetune"
                )
            _refuse_other_data(saved, state, checkpoint.folder)
            resumed = saved
    blend = _blend(config, sources, resumed)
    if blend.edit is not None:
        logger.info("%s", blend.edit)
    _refuse_too_many_epochs(config, blend, sources)
    return RunInputs(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sources=sources,
        validation_sources=held_out,
        blend=blend,
        state=replace(state, schedule=blend.schedule.to_dict()),
        checkpoint=None if checkpoint is None else checkpoint.folder,
        resumed=resumed,
    )


def model_vocab_size(config: RunConfig, tokenizer: Tokenizer) -> int:
    """The model's vocabulary: the tokenizer's, unless the configuration asks for more.

    Raises:
        UserError: The tokenizer has ids that the model would not.
    """
    configured = config.model.vocab_size
    if configured is None:
        return tokenizer.vocab_size
    if configured < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: {configured} is below the {tokenizer.vocab_size} pieces of "
            f"{config.tokenizer.tokenizer_model}; leave it out to take the tokenizer's"
        )
    return configured


def initial_state(
    config: RunConfig, tokenizer: Tokenizer, sources: list[Source], vocab_size: int
) -> RunState:
    """The state of a run that has not begun."""
    return RunState(
        iteration=0,
        consumed_samples=0,
        consumed_tokens=0,
        blend={},
        schedule={},
        sources={source.name: source.fingerprint() for source in sources},
        tokenizer={
            "type": config.tokenizer.tokenizer_type,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        model=LlamaShape.of(config.model, vocab_size).recorded(),
    )


@dataclass(frozen=True)
class _Beginning:
    """The checkpoint that a run begins with, whole or its weights alone."""

    folder: Path
    weights_only: bool


def _checkpoint_to_load(config: RunConfig) -> _Beginning | None:
    settings = config.checkpoint
    if settings.load is not None:
        checkpoint = resolve_checkpoint(Path(settings.load))
        if checkpoint is not None:
            return _Beginning(checkpoint, weights_only=settings.finetune)
        if settings.finetune:
            raise UserError(
                f"checkpoint.load: {settings.load} holds no checkpoint, and --finetune needs its "
                "weights; name a run's folder or one of its iter_ folders"
            )
    if settings.pretrained_checkpoint is not None:
        checkpoint = resolve_checkpoint(Path(settings.pretrained_checkpoint))
        if checkpoint is None:
            raise UserError(
                f"checkpoint.pretrained_checkpoint: {settings.pretrained_checkpoint} holds no "
                "checkpoint; name a run's folder or one of its iter_ folders"
            )
        return _Beginning(checkpoint, weights_only=True)
    if settings.load is not None:
        logger.warning("checkpoint.load: %s holds no checkpoint: starting fresh", settings.load)
    return None


def _refuse_other_model(resumed: RunState, state: RunState, checkpoint: Path) -> None:
    for name in {**resumed.model, **state.model}:
        value = state.model.get(name)
        if resumed.model.get(name) != value:
            raise UserError(
                f"model.{name}: {value} here and {resumed.model.get(name)} in {checkpoint}; give "
                "the model the checkpoint's shape"
            )


def _refuse_other_data(resumed: RunState, state: RunState, checkpoint: Path) -> None:
    if resumed.tokenizer["sha256"] != state.tokenizer["sha256"]:
        raise UserError(
            f"tokenizer.tokenizer_model: is not the one that {checkpoint} was trained with; give "
            "that one, or start from its weights alone with --finetune"
        )
    for name, fingerprint in state.sources.items():
        if name in resumed.sources and resumed.sources[name] != fingerprint:
            raise UserError(
                f"data.sources.{name}: is not the data that {checkpoint} was trained on; give the "
                "same files, or start from its weights alone with --finetune"
            )


def _blend(config: RunConfig, sources: list[Source], resumed: RunState | None) -> Blend:
    """The blend from the beginning, or as the checkpoint left it."""
    batch = config.train.global_batch_size
    if resumed is not None:
        # The sequence is cut by the batch size that the run began with, whatever it is now.
        batch = int(resumed.schedule["samples_per_iteration"])
    schedule = Schedule.from_dict(
        to_plain(config.data.schedule),
        sources=[source.name for source in sources],
        samples_per_iteration=batch,
        seq_length=config.data.seq_length,
    )
    if resumed is None:
        return Blend(schedule)
    return Blend(schedule, state=resumed.blend)


def _refuse_too_many_epochs(config: RunConfig, blend: Blend, sources: list[Source]) -> None:
    limits = {name: source.max_epochs for name, source in config.data.sources.items()}
    check_epochs(
        blend,
        config.num_samples,
        {source.name: source.num_samples for source in sources},
        {name: limit for name, limit in limits.items() if limit is not None},
        config.train.global_batch_size,
    )

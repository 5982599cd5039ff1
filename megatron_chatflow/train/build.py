"""Puts a run together from its configuration, and takes it up where a checkpoint left it.

In: a resolved configuration and this process's ranks. Out: a `Run` and its `Progress`.
"""

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.checkpoint.files import resolve_checkpoint, write_atomically
from megatron_chatflow.checkpoint.store import RunState, load_checkpoint, load_weights
from megatron_chatflow.config import RunConfig, to_plain
from megatron_chatflow.config.model_shape import flops_per_token
from megatron_chatflow.data.blend import Blend
from megatron_chatflow.data.loader import Loader
from megatron_chatflow.data.schedule import Schedule
from megatron_chatflow.data.source import Source, build_sources
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.validation import Validator
from megatron_chatflow.model.attention import choose_backend
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.model.llama import Llama, build_llama
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.peak import peak_flops
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.runtime.signals import StopRequest
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.train.hooks import Hook
from megatron_chatflow.train.hooks.console import Console
from megatron_chatflow.train.hooks.metrics_file import MetricsFile
from megatron_chatflow.train.loop import Progress, Run
from megatron_chatflow.train.optimizer import Optimization, build_optimization

logger = logging.getLogger(__name__)


def build_run(config: RunConfig, ranks: Ranks, stack: ExitStack) -> tuple[Run, Progress]:
    """Builds every part; ``stack`` closes what has to be closed.

    Raises:
        UserError: Data, tokenizer, model and checkpoint do not fit together.
    """
    tokenizer = load_tokenizer(config.tokenizer.tokenizer_model, config.tokenizer.tokenizer_type)
    vocab_size = model_vocab_size(config, tokenizer)
    sources = build_sources(config.data, seed=config.train.seed, tokenizer=tokenizer)
    state = initial_state(config, tokenizer, sources, vocab_size)
    checkpoint = _checkpoint_to_load(config)
    resumed = None
    if checkpoint is not None:
        resumed = RunState.read(checkpoint)
        _refuse_other_model(resumed, state, checkpoint)
        if config.checkpoint.finetune:
            resumed = None
        else:
            _refuse_other_data(resumed, state, checkpoint)
    blend = _blend(config, sources, resumed)
    state = replace(state, schedule=blend.schedule.to_dict())

    llama = _model(config, ranks, vocab_size)
    optimization = build_optimization(config, llama, ranks)
    if checkpoint is not None:
        _load(checkpoint, optimization, ranks, weights_only=resumed is None)
    progress = _progress(blend, resumed)
    optimization.set_consumed_samples(progress.consumed_samples)

    peak, peak_source = peak_flops(ranks.device, llama.dtype)
    _log_choices(config, llama, optimization, ranks, peak_source)
    run = Run(
        config=config,
        ranks=ranks,
        sources=sources,
        blend=blend,
        loader=_loader(config, sources, blend, ranks, stack),
        forward_step=ForwardStep.build(
            llama,
            ranks,
            num_bytes_per_id=tokenizer.num_bytes_per_id,
            num_sources=len(sources),
        ),
        optimization=optimization,
        validator=_validator(config, tokenizer),
        state=state,
        flops_per_token=float(flops_per_token(config.model, vocab_size, config.data.seq_length)),
        peak_flops=peak,
        stop_request=StopRequest(),
        hooks=_hooks(config, ranks, progress, stack),
    )
    stack.callback(run.stop_request.close)
    return run, progress


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
    shape = config.model
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
        model={
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_query_groups": shape.num_query_groups,
            "untie_embeddings_and_output_weights": shape.untie_embeddings_and_output_weights,
            "rotary_base": shape.rotary_base,
            "norm_epsilon": shape.norm_epsilon,
            "vocab_size": vocab_size,
        },
    )


def _checkpoint_to_load(config: RunConfig) -> Path | None:
    if config.checkpoint.load is None:
        return None
    path = Path(config.checkpoint.load)
    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        if config.checkpoint.finetune:
            raise UserError(
                f"checkpoint.load: {path} holds no checkpoint, and --finetune needs its weights; "
                "name a run's folder or one of its iter_ folders"
            )
        logger.warning("checkpoint.load: %s holds no checkpoint: starting fresh", path)
    return checkpoint


def _refuse_other_model(resumed: RunState, state: RunState, checkpoint: Path) -> None:
    for name, value in state.model.items():
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


def _model(config: RunConfig, ranks: Ranks, vocab_size: int) -> Llama:
    with device_mode(ranks.device):
        return build_llama(
            config.model, config.parallel, config.train, ranks, vocab_size=vocab_size
        )


def _load(
    checkpoint: Path, optimization: Optimization, ranks: Ranks, *, weights_only: bool
) -> None:
    if weights_only:
        load_weights(checkpoint, optimization.chunks, ranks)
        with device_mode(ranks.device):
            optimization.optimizer.reload_model_params()
    else:
        load_checkpoint(checkpoint, optimization.chunks, optimization.optimizer, ranks)
    what = "weights" if weights_only else "weights and optimizer state"
    logger.info("loaded %s from %s", what, checkpoint)


def _progress(blend: Blend, resumed: RunState | None) -> Progress:
    if resumed is None:
        return Progress(0, 0, np.zeros(len(blend.schedule.sources), dtype=np.int64))
    return Progress(
        resumed.iteration, resumed.consumed_samples, blend.counts(resumed.consumed_samples)
    )


def _loader(
    config: RunConfig, sources: list[Source], blend: Blend, ranks: Ranks, stack: ExitStack
) -> Loader:
    loader = Loader(
        sources,
        blend,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=ranks.data_parallel_rank,
        data_parallel_size=ranks.data_parallel_size,
        num_prefetch=config.data.num_prefetch,
    )
    stack.callback(loader.close)
    return loader


def _validator(config: RunConfig, tokenizer: Tokenizer) -> Validator | None:
    if config.train.eval_interval is None:
        return None
    held_out = build_sources(
        config.data, seed=config.train.seed, tokenizer=tokenizer, split="validation"
    )
    return Validator(
        sources=held_out,
        max_samples=config.train.eval_iters * config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seq_length=config.data.seq_length,
    )


def _hooks(config: RunConfig, ranks: Ranks, progress: Progress, stack: ExitStack) -> list[Hook]:
    if not ranks.is_reporter:
        return []
    hooks: list[Hook] = [
        Console(num_iterations=config.num_iterations, iteration=progress.iteration)
    ]
    if config.checkpoint.save is not None:
        folder = Path(config.checkpoint.save)
        try:
            hooks.append(MetricsFile(folder, iteration=progress.iteration))
            write_atomically(folder / "config.yaml", config.to_yaml())
        except OSError as error:
            raise UserError(f"checkpoint.save: {folder}: {error.strerror}") from None
        if config.logging.tensorboard:
            from megatron_chatflow.train.hooks.tensorboard import TensorBoard

            hooks.append(TensorBoard(folder, iteration=progress.iteration))
    for hook in hooks:
        stack.callback(hook.close)
    return hooks


def _log_choices(
    config: RunConfig, llama: Llama, optimization: Optimization, ranks: Ranks, peak_source: str
) -> None:
    """Says once which implementation each part of the run uses."""
    choices: dict[str, Any] = {
        "attention": choose_backend(ranks.device, llama.dtype)[1],
        "norm": "torch's rms_norm",
        "rotary embedding": "ours, angles once a micro-batch",
        "SwiGLU": "megatron-core's, unfused",
        "cross-entropy": "ours, chunked and vocabulary-parallel",
        "optimizer": optimization.description,
        "peak": peak_source,
    }
    for part, choice in choices.items():
        logger.info("%s: %s", part, choice)
    logger.info(
        "%s parameters in this process, %d pieces padded to %d rows",
        f"{llama.num_local_parameters():,}",
        llama.vocab_size,
        llama.padded_vocab_size,
    )

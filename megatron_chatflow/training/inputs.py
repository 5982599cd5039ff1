"""Opens what a run reads and checks it for consistency before anything is built.

`RunInputs` holds tokenizer, sources, blend, and the checkpoint to resume from. Opening it needs
neither a GPU nor other ranks, so a dry run does the same.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_chatflow.blend.adaptive import AdaptiveBlend
from megatron_chatflow.blend.blend import MAX_SAMPLES, Blend
from megatron_chatflow.blend.controllers import (
    WeightControl,
    controlled_blend,
    refuse_missing_controller,
)
from megatron_chatflow.blend.edits import run_positions, run_schedule
from megatron_chatflow.blend.objective import ObjectiveWeights
from megatron_chatflow.blend.plan import check_epochs, epoch_findings
from megatron_chatflow.blend.quota import GRID, GRID_BITS
from megatron_chatflow.checkpoint.decisions import read_decisions
from megatron_chatflow.checkpoint.files import check_small_files
from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.config import RunConfig, RunLength, to_plain
from megatron_chatflow.convert.from_huggingface import huggingface_tokenizer
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import LlamaShape, shape_of_huggingface
from megatron_chatflow.convert.template import TokenizerChoice, files_of_run
from megatron_chatflow.convert.to_huggingface import run_tokenizer
from megatron_chatflow.convert.vocabulary import GrownVocabulary, Resize, vocabulary_growth
from megatron_chatflow.convert.weight_map import check_weights
from megatron_chatflow.data.contents import check_contents, verify_contents
from megatron_chatflow.data.findings import data_findings
from megatron_chatflow.data.sidecar import appends_bos, read_sidecar, writes_bos
from megatron_chatflow.data.source import Source, build_sources, token_epochs
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.choice import Question, read_questions
from megatron_chatflow.evaluation.probes import PreparedProbe, parse_probes
from megatron_chatflow.runtime.ranks import format_ranks, gather_objects
from megatron_chatflow.runtime.table import Row
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.small_files import SmallFiles
from megatron_chatflow.training.resume import (
    changed_settings,
    check_same_data,
    check_same_model,
    check_same_seq_length,
    data_seeds,
)
from megatron_chatflow.training.stages import StagePlan, check_edit, plan_stages
from megatron_chatflow.training.start import (
    InitialCheckpoint,
    check_save_folder,
    find_initial_checkpoint,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """The opened inputs of a run."""

    tokenizer: Tokenizer
    vocab_size: int  # vocabulary size of the model before padding
    sources: list[Source]  # training sources in the schedule's order
    # held-out samples of each source; empty if nothing is validated
    validation_sources: list[Source]
    blend: Blend | AdaptiveBlend  # the blend, resumed from the checkpoint if there is one
    objective: ObjectiveWeights  # weights of the sources in the objective
    state: RunState  # state of the run before its first iteration
    checkpoint: Path | None  # checkpoint that provides the weights; None for random weights
    resumed: RunState | None  # state of the checkpoint; None unless the run resumes it
    length: RunLength  # first and last iteration
    stages: StagePlan  # what is trained from which sample on
    questions: Sequence[Question] = ()  # multiple-choice questions to evaluate during training
    probes: Sequence[PreparedProbe] = ()  # probes to evaluate during training
    is_huggingface: bool = False  # whether `checkpoint` is a Hugging Face folder
    # growth of the vocabulary when the weights are loaded; None without growth
    grown: GrownVocabulary | None = None
    # What the user should know before the run starts, one line each. The dry run prints them, and
    # every start logs them as warnings.
    findings: Sequence[str] = ()
    changes: Sequence[Row] = ()  # settings that differ from the checkpoint's, as rows of a table
    control: WeightControl | None = None  # decides the weights; None if they are known
    # test split of each source; empty without `data.split` or with `eval_iters` 0
    test_sources: list[Source] = field(default_factory=list)


def open_inputs(config: RunConfig) -> RunInputs:
    """Opens and checks everything that a run reads, in a single process.

    Raises:
        UserError: Something is missing or damaged, or data, tokenizer, model and checkpoint do not
            fit together.
    """
    return open_inputs_from(find_initial_checkpoint(config), config)


def open_inputs_from(checkpoint: InitialCheckpoint | None, config: RunConfig) -> RunInputs:
    """As `open_inputs`, from a selected checkpoint; None for a fresh start."""
    check_save_folder(config.checkpoint, checkpoint)
    tokenizer = load_tokenizer(config.tokenizer.tokenizer_model, config.tokenizer.tokenizer_type)
    saved = None if checkpoint is None else _saved_state(checkpoint)
    grown = None
    if checkpoint is not None and saved is not None:
        grown = _growth(config, checkpoint, saved, tokenizer)
    vocab_size = model_vocab_size(config, tokenizer)
    if grown is not None:
        vocab_size = grown.growth.num_rows
    elif saved is not None and config.model.vocab_size is None:
        # Models often have more embedding rows than tokens.
        rows = saved.model.get("vocab_size")
        vocab_size = max(vocab_size, rows if isinstance(rows, int) else 0)
    packing_versions = {}
    if checkpoint is not None and saved is not None and not checkpoint.weights_only:
        recorded = {name: source.get("packing") for name, source in saved.sources.items()}
        packing_versions = {name: version for name, version in recorded.items() if version}
    build = partial(
        build_sources,
        config.data,
        seed=config.train.seed,
        tokenizer=tokenizer,
        packing_versions=packing_versions,
    )
    sources = build()
    held_out, test = [], []
    if config.train.validates:
        held_out = build(split="validation")
    if config.data.split is not None and config.train.eval_iters > 0:
        test = build(split="test")
    check_contents(config.data, (sources, held_out, test))
    state = RunState(
        iteration=0,
        consumed_samples=0,
        consumed_tokens=0,
        blend={},
        schedule={},
        sources={source.name: source.fingerprint() for source in sources},
        tokenizer={
            "type": tokenizer.tokenizer_type,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "add_bos_token": _begins_with_bos(config, tokenizer, checkpoint, saved),
        },
        model=LlamaShape.of(config.model, vocab_size).recorded(),
    )
    new_rows = _new_rows(config, checkpoint, saved, grown, tokenizer)
    if new_rows is not None:
        state.tokenizer["new_rows"] = list(new_rows)
    resumed = None
    if checkpoint is not None and saved is not None:
        check_same_model(saved, state, checkpoint.folder, is_grown=grown is not None)
        if checkpoint.weights_only and grown is None:
            _check_same_tokens(config, checkpoint, saved, tokenizer)
        if not checkpoint.weights_only:
            if "samples_per_iteration" not in saved.schedule:
                raise UserError(
                    f"checkpoint.load: {checkpoint.folder} contains only weights and cannot be "
                    "resumed; add --finetune to start a new run from them"
                )
            check_same_seq_length(config, saved, checkpoint.folder)
            if grown is None:
                check_same_data(config, saved, state, checkpoint.folder)
            resumed = saved
    asked = config.train.choice_questions
    questions = [] if asked is None else read_questions(Path(asked))
    prefix_ids = [tokenizer.bos_id] if state.tokenizer["add_bos_token"] else []
    probes = [
        probe.prepare(tokenizer, prefix_ids, config.data.seq_length)
        for probe in parse_probes(config.train.eval_probes, "train.eval_probes")
    ]
    blend = _blend(config, sources, resumed, is_grown=grown is not None)
    positions = run_positions(config)
    if resumed is not None:
        begin = resumed.iteration, resumed.consumed_samples
        positions = run_positions(config, resumed.schedule, *begin)
    folder = None if checkpoint is None else checkpoint.folder
    seeds = data_seeds(config, sources, blend, None if grown else resumed, folder)
    for source in sources:
        source.use_seeds(seeds[source.name])
    length = RunLength.of(config)
    if resumed is not None:
        first = resumed.blend["segments"][0]["schedule"]["samples_per_iteration"]
        length = RunLength.of(config, resumed.iteration, resumed.consumed_samples, int(first))
    length.check_learning_rate(config.optimizer)
    stages = plan_stages(config, positions, vocab_size, new_rows)
    stage_change = ""
    if resumed is not None:
        stage_change = check_edit(
            stages,
            resumed.stages,
            resumed.consumed_samples,
            folder,
            resumed.tokenizer.get("new_rows"),
        )
    sizes = {source.name: source.num_samples for source in sources}
    limits = {name: source.max_epochs for name, source in config.data.sources.items()}
    max_epochs = {name: limit for name, limit in limits.items() if limit is not None}
    control = None
    if isinstance(blend, Blend):
        check_epochs(blend, length, sizes, max_epochs)
    else:
        control = _control(config, blend, sources, held_out, length, resumed)
    findings = [
        *_weight_findings(config, checkpoint),
        *data_findings(config.data, sources, held_out, tokenizer),
        *(
            epoch_findings(blend, length.num_samples, sizes, max_epochs)
            if isinstance(blend, Blend)
            else ()
        ),
        *_validation_findings(config, held_out),
    ]
    left_over = (config.train.train_samples or 0) - length.num_samples
    if left_over > 0:
        findings.append(
            f"train.train_samples: the run ends at sample {length.num_samples:,}; the last "
            f"{left_over:,} of {config.train.train_samples:,} do not fill a global batch of "
            f"{length.batch_sizes.at(length.num_samples):,} and are not trained"
        )
    changes: list[Row] = []
    if resumed is not None and folder is not None:
        changes = changed_settings(config, folder, resumed, blend, length, stage_change)
    return RunInputs(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sources=sources,
        validation_sources=held_out,
        test_sources=test,
        blend=blend,
        objective=ObjectiveWeights(config.data, positions),
        state=replace(state, schedule=blend.schedule.to_dict(), data_seeds=seeds),
        checkpoint=folder,
        resumed=resumed,
        length=length,
        stages=stages,
        questions=questions,
        probes=probes,
        is_huggingface=checkpoint is not None and checkpoint.is_huggingface,
        grown=grown,
        changes=changes,
        control=control,
        findings=list(dict.fromkeys(findings)),
    )


def _weight_findings(config: RunConfig, checkpoint: InitialCheckpoint | None) -> list[str]:
    """Reports random weights unless ``--from-scratch`` requests them."""
    settings = config.checkpoint
    if checkpoint is not None or settings.from_scratch:
        return []
    why = "no initial weights are given"
    if settings.load is not None:
        why = f"{settings.load} contains no checkpoint and no other weights are given"
    return [
        f"checkpoint: RANDOM WEIGHTS: {why}, so the model is trained from scratch; set the "
        "initial weights with --load-hf, --pretrained-checkpoint or --load, or confirm with "
        "--from-scratch"
    ]


def verify_data(config: RunConfig, inputs: RunInputs, *, part: int = 0, num_parts: int = 1) -> None:
    """Verifies whole datasets against their sidecar files, as `verify_contents` does."""
    splits = (inputs.sources, inputs.validation_sources, inputs.test_sources)
    verify_contents(config.data, splits, part=part, num_parts=num_parts)


def carried_files(config: RunConfig, inputs: RunInputs) -> SmallFiles:
    """Collects the small files of the base model that checkpoints carry to an export."""
    return files_of_run(
        inputs.tokenizer,
        {name: source.paths for name, source in config.data.sources.items()},
        inputs.checkpoint,
        is_huggingface=inputs.is_huggingface,
    )


def _validation_findings(config: RunConfig, held_out: list[Source]) -> list[str]:
    """Reports sources without held-out samples if validation is enabled."""
    if not config.train.validates:
        return []
    without = [source.name for source in held_out if source.num_samples == 0]
    if not without:
        return []
    if len(without) == len(held_out):
        what = "no source has held-out samples, so validation is skipped"
    else:
        what = f"{', '.join(without)} has no held-out samples and is not validated"
    every = config.data.holdout_every
    fix = "set data.holdout_every" if every is None else f"lower data.holdout_every ({every})"
    return [f"train.eval_interval: {what}; set validation_paths or {fix}"]


def check_same_inputs_on_all_ranks(inputs: RunInputs) -> None:
    """Checks that all ranks would train on the same data; every rank calls it and raises alike."""
    state = inputs.state
    facts: dict[str, Any] = {"tokenizer.tokenizer_model": state.tokenizer["sha256"]}
    facts |= {f"data.sources.{name}": source for name, source in state.sources.items()}
    facts["data.schedule"] = state.schedule
    facts["data.schedule.knots[].objective_weights"] = inputs.objective.to_list()
    if isinstance(inputs.blend, AdaptiveBlend):
        settings = None if inputs.control is None else to_plain(inputs.control.config)
        decided = inputs.blend.horizon, inputs.blend.decisions()
        facts["data.schedule.controller"] = [settings, *decided]
    facts["train.stages"] = [vars(stage) for stage in inputs.stages.stages]
    facts["train.seed"] = state.data_seeds
    facts["model"] = state.model
    hashes = {
        name: hashlib.sha256(json.dumps(fact, sort_keys=True, default=str).encode()).hexdigest()
        for name, fact in facts.items()
    }
    gathered = gather_objects(hashes)
    for name, expected in gathered[0].items():
        others = [rank for rank, found in enumerate(gathered) if found.get(name) != expected]
        if others:
            raise UserError(
                f"{name}: differs between {format_ranks(others)} and rank 0; give every node the "
                "same files (a dataset's .json beside its .bin and .idx), flags and YAML file"
            )


def model_vocab_size(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Returns the model's vocabulary size, the tokenizer's unless a larger one is configured."""
    configured = config.model.vocab_size
    if configured is None:
        return tokenizer.vocab_size
    if configured < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: {configured} is below the {tokenizer.vocab_size} tokens of "
            f"{config.tokenizer.tokenizer_model}; remove the setting to use the tokenizer's size"
        )
    return configured


def _begins_with_bos(
    config: RunConfig,
    tokenizer: Tokenizer,
    checkpoint: InitialCheckpoint | None,
    saved: RunState | None,
) -> bool:
    """Returns whether texts start with BOS, and warns of sources whose documents do not.

    They do if the tokenizer, the initial weights or a source is configured so.
    """
    sidecars = {
        name: [read_sidecar(path) for path in source.paths]
        for name, source in config.data.sources.items()
    }
    begins = tokenizer.add_bos_token or any(map(appends_bos, chain(*sidecars.values())))
    if saved is not None:
        begins = begins or saved.tokenizer.get("add_bos_token") is True
    if checkpoint is not None and checkpoint.is_huggingface and not begins:
        base = huggingface_tokenizer(checkpoint.folder)
        begins = base is not None and base.add_bos_token
    begins = begins and tokenizer.bos_id >= 0
    without = [name for name, found in sidecars.items() if not all(map(writes_bos, found))]
    if begins and without:
        logger.warning(
            "data.sources: the documents of %s do not start with BOS, but this model expects "
            "it; preprocess them again with preprocess_data.py --append-bos",
            ", ".join(without),
        )
    return begins


def _saved_state(checkpoint: InitialCheckpoint) -> RunState:
    """Reads the state of a checkpoint; a Hugging Face folder only has a model."""
    if not checkpoint.is_huggingface:
        check_small_files(checkpoint.folder)
        return RunState.read(checkpoint.folder)
    shape = shape_of_huggingface(checkpoint.folder)
    check_weights(HuggingFaceWeights(checkpoint.folder), shape)
    return RunState(0, 0, 0, {}, {}, {}, {}, shape.recorded())


def _growth(
    config: RunConfig, checkpoint: InitialCheckpoint, saved: RunState, tokenizer: Tokenizer
) -> GrownVocabulary | None:
    """Computes the growth of the vocabulary; None if it stays or growth is not requested."""
    init = config.checkpoint.embedding_init
    if init is None:
        return None
    if saved.tokenizer.get("sha256") == tokenizer.fingerprint:
        return None  # a restart of the run that has grown them
    old = _old_tokenizer(config.tokenizer.old_tokenizer_model, checkpoint)
    if old is None:
        raise UserError(
            f"checkpoint.embedding_init: {checkpoint.folder} has no tokenizer, so the new tokens "
            "cannot be determined; give the tokenizer of the weights with --old-tokenizer-model"
        )
    if old.fingerprint == tokenizer.fingerprint:
        return None  # already grown
    num_rows = int(saved.model["vocab_size"])
    growth = vocabulary_growth(old, tokenizer, max(num_rows, config.model.vocab_size or 0))
    logger.info(
        "%d new tokens are initialized with %s; the embedding grows from %d to %d rows",
        *(len(growth.pieces), init, num_rows, growth.num_rows),
    )
    return GrownVocabulary(growth, Resize(tokenizer, init, config.train.seed), num_rows)


def _new_rows(
    config: RunConfig,
    checkpoint: InitialCheckpoint | None,
    saved: RunState | None,
    grown: GrownVocabulary | None,
    tokenizer: Tokenizer,
) -> tuple[int, int] | None:
    """Returns the rows of tokens that the tokenizer added to that of the initial weights.

    They come from the growth at this start, from ``tokenizer.old_tokenizer_model``, or from the
    checkpoint. None if there are none.
    """
    if grown is not None and grown.growth.pieces:
        return grown.growth.new_rows
    if saved is None or checkpoint is None:
        return None
    if config.tokenizer.old_tokenizer_model is not None:
        old = load_tokenizer(config.tokenizer.old_tokenizer_model)
        return vocabulary_growth(old, tokenizer, tokenizer.vocab_size).new_rows
    recorded = saved.tokenizer.get("new_rows")
    if recorded is not None:
        is_pair = isinstance(recorded, list) and [type(one) for one in recorded] == [int, int]
        if not is_pair or not 0 <= recorded[0] < recorded[1] <= tokenizer.vocab_size:
            raise UserError(
                f"{checkpoint.folder / 'state.json'}: tokenizer.new_rows is damaged; load another "
                "checkpoint"
            )
        return recorded[0], recorded[1]
    return None


def _old_tokenizer(named: Path | None, checkpoint: InitialCheckpoint) -> Tokenizer | None:
    """Loads the tokenizer that the weights were trained with; None if it is unknown.

    It is the one at the path ``named``, or the checkpoint's own if that is None.
    """
    if checkpoint.is_huggingface:
        return huggingface_tokenizer(named or checkpoint.folder)
    try:
        return run_tokenizer(checkpoint.folder, TokenizerChoice(model=named))
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"tokenizer.old_tokenizer_model: {reason}; give the tokenizer of the weights with "
            "--old-tokenizer-model"
        ) from None


def _check_same_tokens(
    config: RunConfig, checkpoint: InitialCheckpoint, saved: RunState, tokenizer: Tokenizer
) -> None:
    """Checks that each embedding row belongs to the same token as in the checkpoint.

    The hashes of two tokenizers in different file formats differ even if their tokens are equal.
    Weights without a tokenizer of their own may have been grown elsewhere, from
    ``tokenizer.old_tokenizer_model``, which `_new_rows` has compared.
    """
    if saved.tokenizer.get("sha256") == tokenizer.fingerprint:
        return
    named = config.tokenizer.old_tokenizer_model
    old = None
    if checkpoint.is_huggingface or saved.tokenizer:
        try:
            old = _old_tokenizer(None, checkpoint)
        except UserError:
            if named is None:
                raise
            old = _old_tokenizer(named, checkpoint)
    if old is None and named is not None:
        return
    if old is None:
        logger.warning(
            "%s does not record its tokenizer, so it cannot be compared with "
            "tokenizer.tokenizer_model",
            checkpoint.folder,
        )
        return
    growth = vocabulary_growth(old, tokenizer, old.vocab_size)
    if growth.pieces:
        raise UserError(
            f"tokenizer.tokenizer_model: has {len(growth.pieces)} more tokens than the tokenizer "
            f"of {checkpoint.folder}; choose their initialization with --embedding-init"
        )


def _blend(
    config: RunConfig, sources: list[Source], resumed: RunState | None, *, is_grown: bool
) -> Blend | AdaptiveBlend:
    """Builds the blend of a new run, or resumes it from the checkpoint."""
    names = [source.name for source in sources]
    controller = config.data.schedule.controller
    if controller is not None and resumed is not None:
        return controlled_blend(config, resumed.schedule, resumed.blend)
    if controller is not None and controller.run is not None:
        return controlled_blend(config, decisions=read_decisions(controller.run))
    if controller is not None:
        return controlled_blend(config)
    epochs = token_epochs(config.data, sources)
    if resumed is None:
        return Blend(run_schedule(config, names, epochs=epochs))
    refuse_missing_controller(resumed.blend)
    recorded = resumed.schedule.get("epochs") or {}
    now = epochs or {}
    if is_grown and any(list(now.get(name, was)) != list(was) for name, was in recorded.items()):
        raise UserError(
            f"data.schedule.count: {config.data.schedule.count}, which the new tokenizer of a "
            "grown vocabulary changes in every source, so the weights of the run cannot continue; "
            "start a new run with --finetune"
        )
    schedule = run_schedule(
        config, names, resumed.schedule, resumed.iteration, resumed.consumed_samples, epochs
    )
    return Blend(schedule, state=resumed.blend)


def _control(
    config: RunConfig,
    blend: AdaptiveBlend,
    sources: list[Source],
    held_out: list[Source],
    length: RunLength,
    resumed: RunState | None,
) -> WeightControl | None:
    """Builds what decides the weights of a blend; None if it replays recorded decisions."""
    controller = config.data.schedule.controller
    assert controller is not None, "the blend has one"
    limits = [source.max_epochs for source in config.data.sources.values()]
    allowed = [
        None if limit is None else int(min(limit * source.num_samples, MAX_SAMPLES))
        for limit, source in zip(limits, sources, strict=True)
    ]
    # These were decided by another run, or with other limits.
    known = min(blend.decided_samples, length.num_samples)
    for source, most, quota in zip(sources, allowed, blend.quotas(known), strict=True):
        if most is not None and quota > most << GRID_BITS:
            raise UserError(
                f"data.sources.{source.name}.max_epochs: allows {most:,} samples, and the weights "
                f"that are decided up to sample {known:,} draw {quota / GRID:,.1f}; raise it"
                + ("" if known < length.num_samples else ", or train fewer samples")
            )
    if controller.name == "replay":
        return None
    path = "data.schedule.controller"
    active = [k for k, weight in enumerate(blend.schedule.weights(0).tolist()) if weight]
    if controller.name == "shearing":
        without = [held_out[k].name for k in active if not held_out[k].num_samples]
        if without:
            raise UserError(
                f"{path}: shearing needs the validation loss of every source, and "
                f"{', '.join(without)} has no held-out samples; set validation_paths or "
                "data.holdout_every"
            )
    bounds = [allowed[k] for k in active]
    total = sum(map(int, filter(None, bounds)))
    if None not in bounds and total <= length.num_samples:
        raise UserError(
            f"data.sources: max_epochs allow {total:,} samples of all sources, not more than the "
            f"{length.num_samples:,} of the run; raise one, or train fewer samples"
        )
    state = {} if resumed is None else resumed.blend.get("controller", {})
    return WeightControl(controller, blend, allowed, length.num_samples, state)

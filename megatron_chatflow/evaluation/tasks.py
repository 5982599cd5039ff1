"""Runs tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

lm-eval is an optional dependency. Its tasks download their data unless a local task file names a
local path. It receives the loaded model and tokenizer, so BOS and log-probabilities are handled as
for local question files.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.tokenizer.chat_template import JinjaTemplate

# Common names, their lm-eval tasks, and the number of few-shot examples in papers on Chinese LLaMA
# models. GAOKAO means its multiple-choice subjects as published by AGIEval, zero-shot.
_GAOKAO = "biology chemistry chinese english geography history mathqa physics".split()
ALIASES: dict[str, tuple[tuple[str, ...], int]] = {
    "mmlu": (("mmlu",), 5),
    "ceval-valid": (("ceval-valid",), 5),
    "cmmlu": (("cmmlu",), 5),
    "gaokao": (tuple(f"agieval_gaokao_{subject}" for subject in _GAOKAO), 0),
}


@dataclass(frozen=True)
class TaskSettings:
    """Settings of lm-eval."""

    tasks: tuple[str, ...]  # task names, of `ALIASES` or lm-eval's own
    # number of examples; None uses that of `ALIASES`, or the task's own
    num_few_shot: int | None = None
    include_path: Path | None = None  # folder of local task files
    limit: int | None = None  # maximum number of questions per task; None for all
    batch_size: str = "8"  # lm-eval's batch size: a number, or ``auto``
    # whether questions are formatted with the model's chat template
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        """Raises `UserError` if a value is out of range."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit: must be at least 1, not {self.limit}")
        size = self.batch_size.partition(":")  # lm-eval's auto:N tries N times
        number = size[2] or "1" if size[0] == "auto" else self.batch_size
        if not number.isdecimal() or int(number) < 1:
            raise UserError(
                f"--batch-size: {self.batch_size!r} is neither a positive integer nor auto"
            )


def evaluate_tasks(model: LanguageModel, settings: TaskSettings) -> dict[str, dict[str, Any]]:
    """Runs tasks and returns metrics by task; groups and their members have lm-eval's names.

    Raises:
        UserError: lm-eval is not installed, does not know a task, or cannot run it or load its
            data; or the model has no usable chat template to apply.
    """
    try:
        lm_eval: Any = importlib.import_module("lm_eval")
        manager_type: Any = importlib.import_module("lm_eval.tasks").TaskManager
        adapter_type: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError:
        raise UserError(
            "lm-eval is not installed; run pip install 'megatron-chatflow[eval]', or use "
            "--choice to score local files"
        ) from None
    if settings.apply_chat_template and model.chat_template is None:
        raise UserError(
            f"--apply-chat-template: {model.folder} has no chat template; set one with "
            "--chat-template"
        )
    if settings.apply_chat_template and isinstance(model.chat_template, JinjaTemplate):
        model.chat_template.turn_end()  # checks the template's limits, which lm-eval does not have
    # A wrong task file or missing data raises these; the hub raises OSError.
    errors = (
        *(OSError, ConnectionError, ValueError, KeyError),
        importlib.import_module("datasets.exceptions").DatasetsError,
        importlib.import_module("jinja2").TemplateError,
    )
    results: dict[str, dict[str, Any]] = {}
    chosen = _chosen(settings, manager_type)
    adapter = _adapter(model, settings, adapter_type)
    for name, tasks, few_shot, manager in chosen:
        try:
            output = lm_eval.simple_evaluate(
                model=adapter,
                tasks=list(tasks),
                num_fewshot=few_shot,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.apply_chat_template,
                limit=settings.limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=0,
            )
        except errors as error:
            reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
            raise UserError(
                f"--tasks: {name} cannot run, or its data cannot be loaded ({reason}); fix its "
                "task file, or use --choice to score local files"
            ) from None
        results |= _metrics(output, few_shot)
        if len(tasks) > 1:
            results[name] = _mean(output, tasks, few_shot)
    return results


def _chosen(
    settings: TaskSettings, manager_type: Any
) -> list[tuple[str, tuple[str, ...], int | None, Any]]:
    """Resolves each name to lm-eval tasks, a number of examples and a task manager."""
    include = None if settings.include_path is None else str(settings.include_path)
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise UserError(f"--include-path: {include} is not a folder; give a folder with task files")
    # Reading lm-eval's thousands of files takes seconds, which local tasks do not need.
    local = manager_type(include_path=include, include_defaults=False) if include else None
    whole = None
    chosen = []
    for name in settings.tasks:
        tasks, few_shot = ALIASES.get(name, ((name,), None))
        few_shot = few_shot if settings.num_few_shot is None else settings.num_few_shot
        if local is not None and all(task in local.all_tasks for task in tasks):
            chosen.append((name, tasks, few_shot, local))
            continue
        whole = whole or manager_type(include_path=include)
        unknown = [task for task in tasks if task not in whole.all_tasks]
        if unknown:
            raise UserError(
                f"--tasks: lm-eval has no task {unknown[0]}; use a task of lm-eval, or set "
                "--include-path to the folder of the task file"
            )
        chosen.append((name, tasks, few_shot, whole))
    return chosen


def _adapter(model: LanguageModel, settings: TaskSettings, adapter_type: Any) -> Any:
    """Wraps the model for lm-eval.

    The tokenizer adds BOS as configured by `load_pretrained`. Control tokens are recognized only
    with a chat template; in plain tasks their names are text.
    """
    tokenizer, pretrained = model.hf_tokenizer, model.hf_model
    tokenizer.split_special_tokens = not settings.apply_chat_template
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about every model that is already loaded
    try:
        return adapter_type(
            pretrained=pretrained,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=settings.batch_size,
            max_length=model.max_length,
            # In bfloat16, log-probabilities have ties that the logits do not have.
            softmax_dtype="float32",
        )
    finally:
        log.setLevel(level)


def _metrics(output: dict[str, Any], few_shot: int | None) -> dict[str, dict[str, Any]]:
    """Returns lm-eval's results with plain metric names."""
    results = {}
    for task, values in {**output["results"], **output.get("groups", {})}.items():
        metrics: dict[str, Any] = {
            key.split(",")[0]: value
            for key, value in values.items()
            if isinstance(value, (int, float)) and not key.startswith("alias")
        }
        results[task] = {**metrics, "num_few_shot": output["n-shot"].get(task, few_shot)}
    return results


def _mean(output: dict[str, Any], tasks: Sequence[str], few_shot: int | None) -> dict[str, Any]:
    """Computes the accuracy over several tasks that are not a group in lm-eval."""
    counts = {task: output["n-samples"][task]["effective"] for task in tasks}
    right = sum(output["results"][task]["acc,none"] * counts[task] for task in tasks)
    return {"acc": right / sum(counts.values()), "num_few_shot": few_shot}


def parse_task_names(text: str) -> tuple[str, ...]:
    """Parses a comma-separated list of task names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def headline_metric(metrics: dict[str, Any]) -> tuple[str, float] | None:
    """Returns the name and value of a task's main metric; None if it has none of the known ones."""
    order: Sequence[str] = ("acc", "exact_match", "acc_norm", "bits_per_byte", "word_perplexity")
    for name in order:
        if name in metrics:
            return name, float(metrics[name])
    return None

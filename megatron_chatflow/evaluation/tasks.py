"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

lm-eval is an extra; its tasks fetch their data from a hub unless a local task file says where it
lies. It is handed the loaded model and tokenizer, so that texts begin, and log-probabilities are
computed, as for local files of questions.
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

# Names of the field, lm-eval's tasks behind them, and the few-shot examples that papers on Chinese
# LLaMAs use. GAOKAO stands for its multiple-choice subjects as AGIEval publishes them, zero-shot.
ALIASES: dict[str, tuple[tuple[str, ...], int]] = {
    "mmlu": (("mmlu",), 5),
    "ceval-valid": (("ceval-valid",), 5),
    "cmmlu": (("cmmlu",), 5),
    "gaokao": (
        tuple(
            f"agieval_gaokao_{subject}"
            for subject in (
                *("biology", "chemistry", "chinese", "english"),
                *("geography", "history", "mathqa", "physics"),
            )
        ),
        0,
    ),
}


@dataclass(frozen=True)
class TaskSettings:
    """How lm-eval runs.

    Attributes:
        tasks: Names: of `ALIASES`, or lm-eval's own.
        num_few_shot: Examples; None takes the field's for `ALIASES` and the task's own otherwise.
        include_path: A folder of local task files.
        limit: Questions of each task; None takes all.
        batch_size: Of lm-eval: a number, or ``auto``.
        apply_chat_template: Whether questions are put as chats, in the model's template.
    """

    tasks: tuple[str, ...]
    num_few_shot: int | None = None
    include_path: Path | None = None
    limit: int | None = None
    batch_size: str = "8"
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: A value is out of range.
        """
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit: {self.limit} is below 1; ask for some questions")
        size = self.batch_size.partition(":")  # lm-eval's auto:N tries N times
        number = size[2] or "1" if size[0] == "auto" else self.batch_size
        if not number.isdecimal() or int(number) < 1:
            raise UserError(f"--batch-size: {self.batch_size!r} is neither a number nor auto")


def evaluate_tasks(model: LanguageModel, settings: TaskSettings) -> dict[str, dict[str, Any]]:
    """Runs tasks.

    Args:
        model: The model.
        settings: Which tasks, and how.

    Returns:
        Task to metric to value; groups and their parts as lm-eval names them.

    Raises:
        UserError: lm-eval is missing, knows no such task, or cannot run it or reach its data; or
            the model has no chat template to apply, or one that reaches its limits.
    """
    try:
        lm_eval: Any = importlib.import_module("lm_eval")
        manager_type: Any = importlib.import_module("lm_eval.tasks").TaskManager
        adapter_type: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError:
        raise UserError(
            "lm-eval is not installed: pip install 'megatron-chatflow[eval]', or score local files "
            "with --choice"
        ) from None
    if settings.apply_chat_template and model.chat_template is None:
        raise UserError(
            f"--apply-chat-template: {model.folder} has no chat template; name one with "
            "--chat-template"
        )
    if settings.apply_chat_template and isinstance(model.chat_template, JinjaTemplate):
        model.chat_template.turn_end()  # lm-eval renders it without limits: try them here
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
        except _task_errors() as error:
            reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
            raise UserError(
                f"--tasks: {name} cannot be run, or its data cannot be had ({reason}); correct its "
                "task file, or score local files with --choice"
            ) from None
        results |= _metrics(output, few_shot)
        if len(tasks) > 1:
            results[name] = _mean(output, tasks, few_shot)
    return results


def _chosen(
    settings: TaskSettings, manager_type: Any
) -> list[tuple[str, tuple[str, ...], int | None, Any]]:
    """Each name with lm-eval's tasks, few-shot examples and a manager that knows them.

    Raises:
        UserError: lm-eval knows no such task; before any is run.
    """
    include = None if settings.include_path is None else str(settings.include_path)
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise UserError(f"--include-path: {include} is no folder; name one with task files")
    # lm-eval's own thousands of files take seconds to read, which local tasks need not wait for.
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
                f"--tasks: lm-eval knows no {unknown[0]}; give its own name, or the folder of its "
                "file with --include-path"
            )
        chosen.append((name, tasks, few_shot, whole))
    return chosen


def _task_errors() -> tuple[type[Exception], ...]:
    """What a task raises whose file is wrong or whose data are not there; the hub's is OSError."""
    datasets: Any = importlib.import_module("datasets.exceptions")
    jinja2: Any = importlib.import_module("jinja2")
    return (
        *(OSError, ConnectionError, ValueError, KeyError),
        *(datasets.DatasetsError, jinja2.TemplateError),
    )


def _adapter(model: LanguageModel, settings: TaskSettings, adapter_type: Any) -> Any:
    """lm-eval's view of the model.

    Its tokenizer begins texts as the model's do (`load_pretrained`). Names of control tokens stand
    for them only where a chat template writes them; in the text of tasks they are text.
    """
    tokenizer, pretrained = model.theirs
    tokenizer.split_special_tokens = not settings.apply_chat_template
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every model that comes loaded
    try:
        return adapter_type(
            pretrained=pretrained,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=settings.batch_size,
            max_length=model.max_length,
            # Log-probabilities of bfloat16 have ties that the logits have not.
            softmax_dtype="float32",
        )
    finally:
        log.setLevel(level)


def _metrics(output: dict[str, Any], few_shot: int | None) -> dict[str, dict[str, Any]]:
    """lm-eval's results with plain metric names."""
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
    """The accuracy over all questions of several tasks that lm-eval has no group for."""
    counts = {task: output["n-samples"][task]["effective"] for task in tasks}
    right = sum(output["results"][task]["acc,none"] * counts[task] for task in tasks)
    return {"acc": right / sum(counts.values()), "num_few_shot": few_shot}


def parse_task_names(text: str) -> tuple[str, ...]:
    """Task names from a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def headline_metric(metrics: dict[str, Any]) -> tuple[str, float] | None:
    """The metric that stands for a task in a table."""
    order: Sequence[str] = ("acc", "exact_match", "acc_norm", "bits_per_byte", "word_perplexity")
    for name in order:
        if name in metrics:
            return name, float(metrics[name])
    return None

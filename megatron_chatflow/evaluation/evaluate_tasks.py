"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on an exported folder.

In: a Hugging Face folder and task names. Out: each task's metrics. lm-eval is an extra; its tasks
fetch their data from a hub unless a local task file says where it lies.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.errors import UserError

# Names of the field, lm-eval's tasks behind them, and the few-shot examples that papers on Chinese
# LLaMAs use.
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
    """

    tasks: tuple[str, ...]
    num_few_shot: int | None = None
    include_path: Path | None = None
    limit: int | None = None
    batch_size: str = "8"


def evaluate_tasks(folder: Path, settings: TaskSettings) -> dict[str, dict[str, Any]]:
    """Runs tasks.

    Args:
        folder: A Hugging Face folder.
        settings: Which tasks, and how.

    Returns:
        Task to metric to value; groups and their parts as lm-eval names them.

    Raises:
        UserError: lm-eval is missing, knows no such task, or cannot reach its data.
    """
    try:
        lm_eval: Any = importlib.import_module("lm_eval")
        manager_type: Any = importlib.import_module("lm_eval.tasks").TaskManager
    except ImportError:
        raise UserError(
            "lm-eval is not installed: pip install 'megatron-chatflow[eval]', or score local files "
            "with --choice"
        ) from None
    include = None if settings.include_path is None else str(settings.include_path)
    manager = manager_type(include_path=include)
    results: dict[str, dict[str, Any]] = {}
    for name in settings.tasks:
        tasks, few_shot = ALIASES.get(name, ((name,), None))
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise UserError(
                f"--tasks: lm-eval knows no {unknown[0]}; give its own name, or the folder of its "
                "file with --include-path"
            )
        chosen = few_shot if settings.num_few_shot is None else settings.num_few_shot
        try:
            output = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder)},
                tasks=list(tasks),
                num_fewshot=chosen,
                batch_size=settings.batch_size,
                device=_device(),
                limit=settings.limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=0,
            )
        except (OSError, ConnectionError) as error:  # the hub's own errors are among these
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--tasks: the data of {name} cannot be had ({reason}); score local files with "
                "--choice, or write a local task file"
            ) from None
        results |= _metrics(output, chosen)
    return results


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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


def names_of(text: str) -> tuple[str, ...]:
    """Task names from a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def headline(metrics: dict[str, Any]) -> tuple[str, float] | None:
    """The metric that stands for a task in a table."""
    order: Sequence[str] = ("acc", "exact_match", "acc_norm", "bits_per_byte", "word_perplexity")
    for name in order:
        if name in metrics:
            return name, float(metrics[name])
    return None

"""Evaluates models on text, questions, probes and lm-eval tasks, and compares the results.

Models are Hugging Face folders or training checkpoints.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_chatflow.convert.huggingface_folder import huggingface_folder
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.choice import ChoiceSettings, evaluate_choice, read_questions
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.probes import Probe, evaluate_probe, headline_numbers
from megatron_chatflow.evaluation.tasks import TaskSettings, evaluate_tasks, headline_metric
from megatron_chatflow.evaluation.text import DEFAULT_TEMPLATE, TextSource, evaluate_text
from megatron_chatflow.runtime.table import align
from megatron_chatflow.tokenizer.chat_template import TemplateVariables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation."""

    sources: tuple[TextSource, ...] = ()
    # files of multiple-choice questions by name
    questions: Mapping[str, Path] = field(default_factory=dict)
    choice: ChoiceSettings = ChoiceSettings()  # prompt and scoring of the questions
    few_shot_file: Path | None = None  # file of solved examples; None uses the questions' own file
    probes: tuple[Probe, ...] = ()  # probes of transfer
    tasks: TaskSettings | None = None  # lm-eval tasks; None for none
    max_documents: int | None = None  # maximum number of documents per source; None for all
    # maximum number of tokens read at once; None for the model's maximum
    max_length: int | None = None
    template_variables: TemplateVariables = ()  # variables of the chat template

    def __post_init__(self) -> None:
        """Raises `UserError` if a value is out of range."""
        few_shot = self.tasks.num_few_shot if self.tasks else self.choice.num_few_shot
        for flag, value, least in (
            ("--max-documents", self.max_documents, 1),
            ("--max-length", self.max_length, 1),
            ("--num-fewshot", few_shot, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{flag}: must be at least {least}, not {value}")


def evaluate(
    model: Path,
    settings: EvaluationSettings,
    tokenizer: TokenizerChoice | None = None,
    on_open: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Evaluates one model.

    Args:
        model: A Hugging Face folder, a run's folder, or one of its ``iter_`` folders.
        settings: What to evaluate on.
        tokenizer: Tokenizer and chat template; None uses the model's own.
        on_open: Receives a line about the model's BOS token and chat template.

    Returns:
        ``model``, ``tokenizer``, ``begins_with``, ``chat_template``, ``sources``, ``choice``,
        ``probes``, and ``tasks`` if requested.

    Raises:
        UserError: The model or an input does not exist or is invalid.
    """
    questions = {name: read_questions(path) for name, path in settings.questions.items()}
    pool = read_questions(settings.few_shot_file) if settings.few_shot_file else None
    results: dict[str, Any] = {"model": str(model)}
    with huggingface_folder(model, tokenizer) as folder:
        language_model = LanguageModel(folder, settings.max_length, settings.template_variables)
        results |= language_model.facts()
        on_open(_describe(results, tokenizer))
        results["sources"] = {
            source.name: evaluate_text(language_model, source, settings.max_documents).to_dict()
            for source in settings.sources
        }
        results["choice"] = {
            name: evaluate_choice(language_model, asked, settings.choice, pool)
            for name, asked in questions.items()
        }
        results["probes"] = {
            probe.label: evaluate_probe(language_model, probe) for probe in settings.probes
        }
        if settings.tasks is not None:
            results["tasks"] = evaluate_tasks(language_model, settings.tasks)
    return results


def _describe(facts: Mapping[str, Any], choice: TokenizerChoice | None) -> str:
    begin = facts["begins_with"] or "nothing"
    template = facts["chat_template"]
    if choice is not None and choice.chat_template is not None:
        chats = f"{choice.chat_template} (from --chat-template)"
    elif template is not None:
        chats = f"{template['name']} (the model's own)"
    else:
        chats = f"{DEFAULT_TEMPLATE} (the model has none)"
    return f"{facts['model']}: texts start with {begin}; chat template: {chats}"


def to_json(results: Sequence[Mapping[str, Any]]) -> str:
    """Serializes results; non-finite numbers (the loss of no tokens) become null."""
    return json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """Formats return values of `evaluate` with the same settings side by side.

    With two models, the last column is the relative change against the first, except for losses per
    token if the tokens differ. Numbers of probes have their standard errors, and their change is
    the difference.
    """
    columns = [_finite(_figures(result)) for result in results]
    errors = [_probe_numbers(result, "_stderr") for result in results]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    incomparable = _incomparable(results)
    probed = {label for result in results for label in _probe_numbers(result)}
    heads = ["", *(Path(str(result["model"])).name for result in results)]
    if len(results) == 2:
        heads.append("change")
    cells = [heads]
    for label in labels:
        values = [column.get(label) for column in columns]
        line = [label, *("-" if value is None else f"{value:.4f}" for value in values)]
        for column, error in enumerate(errors, start=1):
            if label in error:
                line[column] += f" ± {error[label]:.4f}"
        if len(values) == 2:
            first, second = values
            if label in probed and first is not None and second is not None:
                line.append(f"{second - first:+.4f}")
            elif first and second and label not in incomparable:
                line.append(f"{100 * (second / first - 1):+.1f}%")
            else:
                line.append("-")
        cells.append(line)
    return "\n".join(align(cells, [column == 0 for column in range(len(heads))]))


def _incomparable(results: Sequence[Mapping[str, Any]]) -> set[str]:
    """Returns the labels of per-token values of sources that two models tokenize differently."""
    if len(results) != 2:
        return set()
    first, second = results
    labels = set()
    for name in first.get("sources", {}).keys() & second.get("sources", {}).keys():
        hashes = {(result.get("tokenizer") or {}).get("sha256") for result in results}
        counts = {
            ((result.get("tokenizer") or {}).get("vocab_size"), counted.get("num_tokens"))
            for result in results
            for counted in [result["sources"][name]]
        }
        # A different file may hold the same vocabulary.
        if len(hashes) > 1 and len(counts) > 1:
            labels |= {f"{name} loss", f"{name} perplexity"}
    return labels


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, values in result.get("sources", {}).items():
        for field_name in ("bits_per_byte", "loss", "perplexity"):
            figures[f"{name} {field_name}"] = values[field_name]
    for name, values in result.get("choice", {}).items():
        for field_name in ("accuracy", "accuracy_per_byte"):
            if field_name in values:
                figures[f"{name} {field_name}"] = values[field_name]
    figures |= _probe_numbers(result)
    for name, values in result.get("tasks", {}).items():
        shown = headline_metric(values)
        if shown is not None:
            figures[f"{name} {shown[0]}"] = shown[1]
    return figures


def _probe_numbers(result: Mapping[str, Any], suffix: str = "") -> dict[str, float]:
    """Returns the numbers of all probes, or those with a suffix such as ``_stderr``, by label."""
    return {
        f"{label} {name}": values[f"{name}{suffix}"]
        for label, values in result.get("probes", {}).items()
        for name in headline_numbers(values)
        if f"{name}{suffix}" in values
    }

"""``chatflow evaluate``: evaluates a model on text, questions, probes and lm-eval tasks."""

import argparse
import logging
from pathlib import Path

from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.evaluation.choice import LANGUAGES, SCORINGS, ChoiceSettings
from megatron_chatflow.evaluation.evaluate import (
    EvaluationSettings,
    evaluate,
    format_results,
    to_json,
)
from megatron_chatflow.evaluation.probes import PROBES, parse_probes
from megatron_chatflow.evaluation.tasks import TaskSettings, parse_task_names
from megatron_chatflow.evaluation.text import TextSource
from megatron_chatflow.files import check_output_file, write_output_file
from megatron_chatflow.generation.generate import TEMPLATE_HELP
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
from megatron_chatflow.tokenizer.chat_template import template_variables

EXAMPLES = """examples:
  %(prog)s exports/zh --baseline Llama-2-7b-hf --source zh=zh.valid.jsonl \\
      --source pairs:pairs=pairs.valid.jsonl --source chat:chat=chat.valid.jsonl
  %(prog)s runs/zh --choice questions.jsonl --num-fewshot 5 --output results.json
  %(prog)s exports/zh --probe copy,length=32 --probe fewshot:zh.instructions.jsonl \\
      --probe translation:pairs.valid.jsonl --probe pairs:minimal_pairs.jsonl
  %(prog)s exports/zh --tasks mmlu,ceval-valid,cmmlu,gaokao
"""


def main() -> None:
    """Evaluates the model and the baseline, prints a table and writes the results as JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parse()
    settings = _settings(args)
    if not (settings.sources or settings.questions or settings.probes or settings.tasks):
        raise UserError("nothing to evaluate; set --source, --choice, --probe or --tasks")
    if args.output:
        check_output_file(args.output)
    if args.template and args.chat_template:
        raise UserError("--template and --chat-template: set only one of them")
    if args.apply_chat_template and not args.tasks:
        raise UserError(
            "--apply-chat-template: only applies to lm-eval tasks; set them with --tasks"
        )
    template = args.template or args.chat_template
    models = [(args.model, TokenizerChoice(args.tokenizer_model, template))]
    if args.baseline:
        advice = "give the run's tokenizer with --baseline-tokenizer-model"
        choice = TokenizerChoice(args.baseline_tokenizer_model, template, advice=advice)
        models.insert(0, (args.baseline, choice))
    results = [evaluate(model, settings, tokenizer, print) for model, tokenizer in models]
    if args.output:
        write_output_file(args.output, to_json(results))
    print(format_results(results))


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(
        "Evaluates a model, and a baseline if given, on text, questions and tasks.", EXAMPLES
    )
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face folder, run or iter_ folder")
    add("--tokenizer-model", type=Path, help="tokenizer to use instead of the model's")
    add("--baseline", type=Path, help="model to compare with")
    add("--baseline-tokenizer-model", type=Path, help="tokenizer to use instead of the baseline's")
    add(
        "--source",
        action="append",
        default=[],
        metavar="NAME[:FORMAT]=FILE",
        help="file to evaluate on; FORMAT is text, pairs or chat",
    )
    add("--chat-template", metavar="T", help=TEMPLATE_HELP)
    add(
        "--template",
        choices=list(JINJA_TEMPLATES),
        help="built-in chat template to use instead of the model's",
    )
    add(
        "--chat-template-kwargs",
        default="{}",
        metavar="JSON",
        help="variables of the chat template as JSON, such as enable_thinking",
    )
    add("--encoding", default="utf-8", metavar="E", help="encoding of the sources")
    add("--max-documents", type=int, help="maximum number of documents per source")
    add("--max-length", type=int, help="context length (default: the model's)")
    add("--choice", action="append", type=Path, default=[], help="file of questions (repeatable)")
    add(
        "--scoring",
        choices=SCORINGS,
        default="letter",
        help="what to score in each choice; default: %(default)s",
    )
    add(
        "--num-fewshot",
        type=int,
        help="examples before each question (default: 0; for lm-eval: the task's)",
    )
    add("--few-shot-file", type=Path, help="file of the examples (default: the questions' file)")
    add(
        "--language",
        choices=LANGUAGES,
        default="en",
        help="language of the prompts; default: %(default)s",
    )
    add(
        "--probe",
        action="append",
        default=[],
        metavar="NAME[,KEY=VALUE...][:FILE]",
        help=f"probe of transfer between languages (repeatable); NAME is {', '.join(PROBES)}",
    )
    add(
        "--tasks",
        type=parse_task_names,
        default=(),
        help="comma-separated lm-eval tasks, and mmlu,ceval-valid,cmmlu,gaokao",
    )
    add("--include-path", type=Path, help="folder of local lm-eval task files")
    add("--apply-chat-template", action="store_true", help="format lm-eval questions as chats")
    add("--limit", type=int, help="maximum number of questions per lm-eval task")
    add("--batch-size", default="8", help="batch size of lm-eval; default: %(default)s")
    add("--output", type=Path, help="JSON file to write the results to")
    return parser.parse_args()


def _settings(args: argparse.Namespace) -> EvaluationSettings:
    shots = args.num_fewshot
    tasks = TaskSettings(
        args.tasks, shots, args.include_path, args.limit, args.batch_size, args.apply_chat_template
    )
    return EvaluationSettings(
        sources=tuple(TextSource.parse(text, encoding=args.encoding) for text in args.source),
        questions={path.name.split(".")[0]: path for path in args.choice},
        choice=ChoiceSettings(args.scoring, shots or 0, args.language),
        few_shot_file=args.few_shot_file,
        probes=tuple(parse_probes(args.probe, "--probe")),
        tasks=tasks if args.tasks else None,
        max_documents=args.max_documents,
        max_length=args.max_length,
        template_variables=template_variables(args.chat_template_kwargs),
    )

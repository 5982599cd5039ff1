"""Evaluates a model on text, on multiple-choice questions and on lm-eval's tasks.

In: a Hugging Face folder or a training checkpoint. Out: a table, and results as JSON.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import logging
from pathlib import Path

from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.evaluation.choice import LANGUAGES, SCORINGS, ChoiceSettings
from megatron_chatflow.evaluation.evaluate import (
    EvaluationSettings,
    evaluate,
    format_results,
    to_json,
)
from megatron_chatflow.evaluation.tasks import TaskSettings, parse_task_names
from megatron_chatflow.evaluation.text import TextSource
from megatron_chatflow.files import check_output_file, write_output_file
from megatron_chatflow.generation.generate import TEMPLATE_HELP
from megatron_chatflow.preprocess.templates import TEMPLATES

EXAMPLES = """examples:
  python tools/evaluate.py exports/zh --baseline Llama-2-7b-hf --source zh=zh.valid.jsonl \\
      --source pairs:pairs=pairs.valid.jsonl --source chat:chat=chat.valid.jsonl
  python tools/evaluate.py runs/zh --choice questions.jsonl --num-fewshot 5 --output results.json
  python tools/evaluate.py exports/zh --tasks mmlu,ceval-valid,cmmlu,gaokao
"""


def main() -> None:
    """Parses the command line, evaluates, prints the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parse()
    settings = _settings(args)
    if not (settings.sources or settings.questions or settings.tasks):
        raise UserError("nothing to evaluate on: give --source, --choice or --tasks")
    if args.output:
        check_output_file(args.output)
    if args.template and args.chat_template:
        raise UserError("--template and --chat-template: give one of the two")
    if args.apply_chat_template and not args.tasks:
        raise UserError("--apply-chat-template: is of lm-eval's tasks; name some with --tasks")
    template = args.template or args.chat_template
    models = [(args.model, TokenizerChoice(args.tokenizer_model, template))]
    if args.baseline:
        advice = "name the run's own with --baseline-tokenizer-model"
        choice = TokenizerChoice(args.baseline_tokenizer_model, template, advice=advice)
        models.insert(0, (args.baseline, choice))
    results = [evaluate(model, settings, tokenizer, print) for model, tokenizer in models]
    if args.output:
        write_output_file(args.output, to_json(results))
    print(format_results(results))


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Evaluates a model, beside a base model if one is given.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face folder, run or iter_ folder")
    add("--tokenizer-model", type=Path, help="instead of the model's own")
    add("--baseline", type=Path, help="another model, shown beside it")
    add("--baseline-tokenizer-model", type=Path, help="the same of the baseline")
    add(
        "--source",
        action="append",
        default=[],
        metavar="NAME[:FORMAT]=FILE",
        help="text, pairs or chat",
    )
    add("--chat-template", metavar="T", help=TEMPLATE_HELP)
    add("--template", choices=list(TEMPLATES), help="the same, by name alone")
    add("--encoding", default="utf-8", metavar="E", help="of sources: gb18030, big5, utf-16 ...")
    add("--max-documents", type=int, help="of each source")
    add("--max-length", type=int, help="tokens read at once (default: the model's longest)")
    add("--choice", action="append", type=Path, default=[], help="file of questions (repeatable)")
    add("--scoring", choices=SCORINGS, default="letter", help="what is compared")
    add(
        "--num-fewshot", type=int, help="solved questions before each (default: 0; of lm-eval: its)"
    )
    add("--few-shot-file", type=Path, help="where they come from (default: the file itself)")
    add("--language", choices=LANGUAGES, default="en", help="of the words around questions")
    add(
        "--tasks",
        type=parse_task_names,
        default=(),
        help="lm-eval's, and mmlu,ceval-valid,cmmlu,gaokao",
    )
    add("--include-path", type=Path, help="folder of local lm-eval task files")
    add("--apply-chat-template", action="store_true", help="put lm-eval's questions as chats")
    add("--limit", type=int, help="questions of each lm-eval task")
    add("--batch-size", default="8", help="of lm-eval; default: %(default)s")
    add("--output", type=Path, help="results as JSON")
    return parser.parse_args()


def _settings(args: argparse.Namespace) -> EvaluationSettings:
    shots = args.num_fewshot
    tasks = TaskSettings(
        args.tasks,
        shots,
        args.include_path,
        args.limit,
        args.batch_size,
        args.apply_chat_template,
    )
    return EvaluationSettings(
        sources=tuple(TextSource.parse(text, encoding=args.encoding) for text in args.source),
        questions={path.name.split(".")[0]: path for path in args.choice},
        choice=ChoiceSettings(args.scoring, shots or 0, args.language),
        few_shot_file=args.few_shot_file,
        tasks=tasks if args.tasks else None,
        max_documents=args.max_documents,
        max_length=args.max_length,
    )


if __name__ == "__main__":
    run_main(main)

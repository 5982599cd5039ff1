"""Evaluates multiple-choice questions from local files, as the authors of MMLU and C-Eval do.

``letter`` scoring compares the probabilities of the letters after "Answer:" (Hendrycks et al.,
"Measuring Massive Multitask Language Understanding", 2021). ``continuation`` scoring compares those
of the whole choices, in total and per byte. `evaluate_choice` evaluates an exported model.

`ChoiceValidator` gives the same accuracies for a model in training, at any parallel layout.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from megatron_chatflow.config.fields import shorten
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.scoring import PackedRows, ScoredRow
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.tokenizer import Tokenizer

Scoring = Literal["letter", "continuation"]
Language = Literal["en", "zh"]
SCORINGS: tuple[Scoring, ...] = get_args(Scoring)
LANGUAGES: tuple[Language, ...] = get_args(Language)
LETTERS = "ABCDEFGHIJ"

_HEADERS = {
    "en": "The following are multiple choice questions (with answers){about}.\n\n",
    "zh": "以下是{about}单项选择题，请选出其中的正确答案。\n\n",
}
_ABOUT = {"en": " about {subject}", "zh": "关于{subject}的"}
_ANSWER = {"en": "Answer:", "zh": "答案："}
_BEFORE_ANSWER = {"en": " ", "zh": ""}


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    subject: str  # subject of the question; "" if the file does not give it
    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    # file and line, for messages; "" if the question was not read from a file
    place: str = field(default="", compare=False)  # files may share questions


@dataclass(frozen=True)
class ChoiceSettings:
    """Prompt and scoring of multiple-choice questions."""

    scoring: Scoring = "letter"  # whether letters or whole choices are scored
    # number of solved examples before each question, of its subject if possible
    num_few_shot: int = 0
    language: Language = "en"  # language of the prompt around the questions


def read_questions(path: Path) -> list[Question]:
    """Reads JSON lines with ``question``, ``choices`` (or ``A``, ``B``, ...) and ``answer``.

    ``answer`` is an index or a letter; ``subject`` is optional.

    Raises:
        UserError: The file cannot be read, or a line is not a question.
    """
    try:
        # Not `splitlines`, which also splits at U+2028 and U+0085 inside JSON strings.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(json.loads(line), f"{path}: line {number}"))
        except (ValueError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is not a question ({type(error).__name__}: {error}); "
                "write an object with question, choices and answer"
            ) from None
    if not questions:
        raise UserError(f"{path}: contains no questions; write one JSON object per line")
    return questions


def _question(record: Any, place: str) -> Question:
    if not isinstance(record, Mapping):
        raise ValueError("not a JSON object")
    given = record.get("choices")
    if given is None:
        given = [record[letter] for letter in LETTERS if letter in record]
    if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS):
        raise ValueError(f"choices must be a list of 2 to {len(LETTERS)} entries")
    for letter, choice in zip(LETTERS, given, strict=False):
        # The probability of an empty choice would be 1.
        if not isinstance(choice, str | int | float) or not str(choice).strip():
            raise ValueError(f"choice {letter} is empty or not a string")
    index = _index(record["answer"])
    if not 0 <= index < len(given):
        raise ValueError(
            f"answer {shorten(record['answer'])} is not one of the {len(given)} choices"
        )
    subject = str(record.get("subject", "")).replace("_", " ")
    question, choices = str(record["question"]), tuple(map(str, given))
    "".join((subject, question, *choices)).encode()  # raises for lone surrogates
    return Question(subject, question, choices, index, place)


def _index(answer: Any) -> int:
    """Returns the index of an answer; -1 if it is invalid."""
    if isinstance(answer, str):
        letter = answer.strip()
        return LETTERS.find(letter) if len(letter) == 1 else -1
    is_whole = type(answer) is int or (type(answer) is float and answer.is_integer())
    return int(answer) if is_whole else -1


def select_few_shot_examples(
    questions: Sequence[Question], number: int, pool: Sequence[Question], count: int
) -> list[Question]:
    """Selects solved examples from a pool, which may be the questions themselves.

    The first other questions of the same subject come first, then those of any subject.
    """
    asked = questions[number]
    others = [q for q in pool if q != asked]
    same = [q for q in others if q.subject == asked.subject]
    rest = [q for q in others if q.subject != asked.subject]
    return (same + rest)[:count]


def build_prompt(question: Question, examples: Sequence[Question], settings: ChoiceSettings) -> str:
    """Builds the prompt up to the answer."""
    language = settings.language
    about = _ABOUT[language].format(subject=question.subject) if question.subject else ""
    text = _HEADERS[language].format(about=about)
    for example in examples:
        answer = _continuations(example, settings)[example.answer]
        text += _format_question(example, settings) + answer + "\n\n"
    return text + _format_question(question, settings)


def _format_question(question: Question, settings: ChoiceSettings) -> str:
    lines = [question.question.strip()]
    if settings.scoring == "letter":
        lines += [
            f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)
        ]
    return "\n".join([*lines, _ANSWER[settings.language]])


def _continuations(question: Question, settings: ChoiceSettings) -> list[str]:
    """Returns the possible continuations of the prompt, one per choice."""
    texts = [choice.strip() for choice in question.choices]
    if settings.scoring == "letter":
        texts = list(LETTERS[: len(question.choices)])
    return [_BEFORE_ANSWER[settings.language] + text for text in texts]


def evaluate_choice(
    model: LanguageModel,
    questions: Sequence[Question],
    settings: ChoiceSettings,
    pool: Sequence[Question] | None = None,
) -> dict[str, Any]:
    """Evaluates an exported model on all questions.

    Solved examples are selected from ``pool``; None uses the other questions.

    Returns:
        ``accuracy`` with its ``standard_error``, ``accuracy_per_byte`` of whole choices,
        ``chance``, ``num_questions``, and ``subjects`` with the accuracy of each.
    """
    counted = tqdm(questions, desc="choice", unit="question", disable=None)
    scores = []
    for number, question in enumerate(counted):
        examples = select_few_shot_examples(
            questions, number, pool or questions, settings.num_few_shot
        )
        prompt, answers = encode_question(
            *(model.tokenizer, model.prefix_ids, model.max_length, question, examples, settings)
        )
        scores.append(_scores(model, prompt, answers))
    return summarize_choice(questions, scores, settings)


def summarize_choice(
    questions: Sequence[Question], all_scores: Sequence[Sequence[float]], settings: ChoiceSettings
) -> dict[str, Any]:
    """Computes the result of `evaluate_choice` from the log-probability of each choice."""
    right: list[bool] = []
    right_per_byte: list[bool] = []
    for question, given in zip(questions, all_scores, strict=True):
        continuations = _continuations(question, settings)
        scores = np.array(given)
        # As lm-eval's acc_bytes, without the space before an answer.
        lengths = np.array([len(text.strip().encode()) for text in continuations])
        right.append(int(scores.argmax()) == question.answer)
        right_per_byte.append(int((scores / lengths).argmax()) == question.answer)
    accuracy = float(np.mean(right))
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(right)),
        "chance": float(np.mean([1 / len(question.choices) for question in questions])),
        "num_questions": len(questions),
        "num_few_shot": settings.num_few_shot,
        "scoring": settings.scoring,
    }
    if settings.scoring == "continuation":
        result["accuracy_per_byte"] = float(np.mean(right_per_byte))
    by_subject: dict[str, list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        by_subject.setdefault(question.subject, []).append(is_right)
    result["subjects"] = {name: float(np.mean(values)) for name, values in by_subject.items()}
    return result


def encode_question(
    tokenizer: Tokenizer,
    prefix_ids: Sequence[int],
    max_length: int,
    question: Question,
    examples: Sequence[Question],
    settings: ChoiceSettings,
) -> tuple[list[int], list[list[int]]]:
    """Encodes the prompt of a question and each of its choices.

    `question_row` truncates what does not fit from the left, as lm-eval does.

    Args:
        tokenizer: Tokenizer of the model.
        prefix_ids: Ids before every text.
        max_length: Maximum number of tokens of a choice.
        question: The question.
        examples: Solved examples before it.
        settings: Prompt and scoring.

    Returns:
        Ids of the prompt, and of each choice.

    Raises:
        UserError: A choice has no token in this tokenizer.
    """
    continuations = _continuations(question, settings)
    answers = [tokenizer.encode_continuation(text)[:max_length] for text in continuations]
    for letter, ids in zip(LETTERS, answers, strict=False):
        if not ids:
            raise UserError(
                f"{question.place}: choice {letter} encodes to no tokens with this model's "
                "tokenizer; remove the question"
            )
    prompt = [*prefix_ids, *tokenizer.encode(build_prompt(question, examples, settings))]
    return prompt, answers


def question_row(prompt: Sequence[int], answer: Sequence[int], max_length: int) -> list[int]:
    """Joins a question and a choice, truncated from the left to ``max_length`` + 1 ids.

    The last id is a label only, so the model reads at most ``max_length`` ids.
    """
    return [*prompt, *answer][-(max_length + 1) :]


def _scores(model: LanguageModel, prompt: list[int], answers: list[list[int]]) -> list[float]:
    """Returns the log-probability of each answer after the prompt."""
    if max(map(len, answers)) == 1:
        read = prompt[-model.max_length :]
        scores = model.next_log_probs([read], [[ids[0] for ids in answers]])[0]
        return [float(score) for score in scores]
    log_probs = model.log_probs([question_row(prompt, ids, model.max_length) for ids in answers])
    return [
        float(values[-len(ids) :].sum()) for values, ids in zip(log_probs, answers, strict=True)
    ]


@dataclass(frozen=True)
class ChoiceValidator:
    """Evaluates questions during training; they are encoded and packed once."""

    name: str  # name of the questions in the logs
    questions: Sequence[Question]
    settings: ChoiceSettings
    packed: PackedRows  # a row for each choice

    @classmethod
    def build(
        cls,
        name: str,
        questions: Sequence[Question],
        settings: ChoiceSettings,
        *,
        tokenizer: Tokenizer,
        begins_with_bos: bool,
        seq_length: int,
        micro_batch_size: int,
    ) -> "ChoiceValidator":
        """Encodes and packs the questions, which are also the candidates for solved examples.

        Args:
            name: Name of the questions in the logs.
            questions: The questions.
            settings: Prompt and scoring.
            tokenizer: Tokenizer of the run.
            begins_with_bos: Whether texts start with BOS.
            seq_length: Maximum number of input tokens: question and choice without its last
                token.
            micro_batch_size: A micro-batch holds this number times ``seq_length`` tokens.
        """
        prefix_ids = [tokenizer.bos_id] if begins_with_bos else []
        rows: list[ScoredRow] = []
        for number, question in enumerate(questions):
            examples = select_few_shot_examples(questions, number, questions, settings.num_few_shot)
            prompt, answers = encode_question(
                *(tokenizer, prefix_ids, seq_length, question, examples, settings)
            )
            for answer in answers:
                row = question_row(prompt, answer, seq_length)
                rows.append(ScoredRow(row, [(len(row) - len(answer), len(row))]))
        packed = PackedRows.build(
            rows,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            fill_id=tokenizer.eos_id,
        )
        return cls(name, questions, settings, packed)

    def run(self, forward_step: ForwardStep, chunks: list[Any], ranks: Ranks) -> dict[str, Any]:
        """Evaluates all questions; every rank calls it and receives the same result."""
        log_probs = iter(self.packed.log_probs(forward_step, chunks, ranks).tolist())
        scores = [[next(log_probs) for _ in question.choices] for question in self.questions]
        return summarize_choice(self.questions, scores, self.settings)

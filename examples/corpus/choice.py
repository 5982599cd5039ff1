"""Choice questions: the development set of MMLU as lm-eval carries it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from examples.corpus.archive import read_member
from examples.corpus.text import Document, tidy

_PROMPTS = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_QUESTION = re.compile(
    r"Q:\s*(.*?)\n\(A\)\s*(.*?)\s*\(B\)\s*(.*?)\s*\(C\)\s*(.*?)\s*\(D\)\s*(.*?)\n"
    r"A: (.*?)(?=\n\nQ:|\Z)",
    re.DOTALL,
)
_ANSWER = re.compile(r"[Tt]he (?:correct )?answer is \(?([ABCD])\)?\.?\s*$")


def mmlu_questions(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the questions by subject."""
    prompts = json.loads(read_member(archives["lm-eval"], _PROMPTS))
    for subject, prompt in sorted(prompts.items()):
        for record in parse_prompt(prompt):
            yield Document(subject, {"subject": subject, **record})


def parse_prompt(prompt: str) -> Iterator[dict[str, object]]:
    """Yields the questions of a few-shot prompt that end with their answer."""
    for question, *choices, reasoning in _QUESTION.findall(prompt):
        answer = _ANSWER.search(reasoning.strip())
        choices = [tidy(choice) for choice in choices]
        if answer and question.strip() and all(choices) and len(set(choices)) == len(choices):
            yield {
                "question": tidy(question),
                "choices": choices,
                "answer": "ABCD".index(answer.group(1)),
            }

"""Conversations: instructions with answers, preferred answers, small talk.

The group of a document is its first question, so that the same question never lies on both sides
of the split.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.corpus.archive import read_member, read_members
from examples.corpus.text import HAN, Document, num_han, tidy_code

ASSISTANT_NAME = "ChatFlow"
"""The name of the demo's assistant."""

_AUTHOR_EN, _AUTHOR_ZH = "the megatron_chatflow project", "megatron_chatflow 项目"

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant"}
_ROLES |= {"assistant": "assistant"}
_NO_INPUT = {"", "<noinput>", "noinput", "n/a", "none", "无", "无输入", "<无输入>", "（无输入）"}
# Answers to an instruction whose input is missing.
_MATERIAL_LOST = re.compile(
    "没有提供(?:任何|具体|给|足够|相关|所需|需要|原始|输入|文|句|信息|数据|图)"
    "|请(?:您)?提供(?:更多|相应|具体|相关|需要|文|句|输入|原)|无法(?:查看|看到|打开|访问)"
    r"|(?:not|n't) (?:provide|specify|include)d? (?:any|the|a|enough)\b"
    r"|[Pp]lease provide (?:the|me|more|a)\b|cannot (?:see|view|open|access)"
)
_ASKS_FOR_ENGLISH = re.compile("英文|英语|翻译|译成|[Ee]nglish|[Tt]ranslat")
_BLANK_IN_TEXT = re.compile(f"(?<=[{HAN}，。]) (?=[{HAN}])")
_SMALL_TALK = r"chatterbot_corpus/data/english/[\w-]+\.yml"
_MAX_CHARACTERS = 12_000


def instructions(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields llamafactory's demonstration sets without tool calls."""
    archive = archives["llamafactory"]

    def load(name: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = json.loads(read_member(archive, f"data/{name}.json"))
        return entries

    for name in ("alpaca_en_demo", "alpaca_zh_demo"):
        for entry in load(name):
            yield from _conversation(from_alpaca(entry))
    for name in ("dpo_en_demo", "dpo_zh_demo"):
        for entry in load(name):
            yield from _conversation(from_turns([*entry["conversations"], entry["chosen"]]))
    for entry in load("kto_en_demo"):
        if entry["label"] is True:
            yield from _conversation(from_turns(entry["messages"]))
    for name in ("glaive_toolcall_en_demo", "glaive_toolcall_zh_demo"):
        for entry in load(name):
            yield from _conversation(from_turns(entry["conversations"]))
    for entry in load("identity"):
        author = _AUTHOR_ZH if num_han(entry["output"]) else _AUTHOR_EN
        named = {
            key: _BLANK_IN_TEXT.sub(
                "", value.replace("{{name}}", ASSISTANT_NAME).replace("{{author}}", author)
            )
            for key, value in entry.items()
        }
        yield from _conversation(from_alpaca(named))


def from_alpaca(entry: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns the turns of an entry with instruction, optional input, and output."""
    question = entry["instruction"]
    if (entry.get("input") or "").strip().lower() not in _NO_INPUT:
        question += "\n\n" + entry["input"]
    return [("user", question), ("assistant", entry["output"])]


def from_turns(turns: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Returns the turns of a conversation, or no turns if it has tool calls."""
    converted = []
    for turn in turns:
        role = _ROLES.get(turn.get("from") or turn.get("role") or "")
        if role is None:
            return []
        converted.append((role, turn.get("value") or turn.get("content") or ""))
    return converted


def small_talk(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the English questions and answers of chatterbot-corpus."""
    for _, content in read_members(archives["chatterbot-corpus"], _SMALL_TALK):
        for lines in yaml.safe_load(content).get("conversations") or []:
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
                continue
            if any("```" in line for line in lines):  # code whose line ends YAML has folded away
                continue
            lines = lines[: len(lines) // 2 * 2]
            roles = ("user", "assistant") * (len(lines) // 2)
            yield from _conversation(
                [(role, as_sentence(line)) for role, line in zip(roles, lines, strict=True)]
            )


def as_sentence(line: str) -> str:
    """Capitalizes a line and adds its final punctuation."""
    line = " ".join(line.split())
    line = re.sub(r"\bi(?='|\b)(?!\.)", "I", line)
    line = line[:1].upper() + line[1:]
    if line and line[-1].isalnum():
        asks = re.match(
            r"(?:what|who|whom|why|when|where|which|how|do|does|did|is|are|am|was|were|"
            r"can|could|will|would|have|has|should|shall|may)\b",
            line.lower(),
        )
        line += "?" if asks else "."
    return line


def _conversation(turns: Sequence[tuple[str, str]]) -> Iterator[Document]:
    """Yields a document if the turns alternate and none is empty."""
    turns = [(role, tidy_code(content)) for role, content in turns]
    if turns and turns[0][0] == "system" and not turns[0][1]:
        turns = turns[1:]
    spoken = [turn for turn in turns if turn[0] != "system"]
    roles = [role for role, _ in spoken]
    if not spoken or roles != ["user", "assistant"] * (len(spoken) // 2):
        return
    if any(role == "system" for role, _ in turns[1:]) or not all(content for _, content in turns):
        return
    if sum(len(content) for _, content in turns) > _MAX_CHARACTERS:
        return
    if any(role == "assistant" and _MATERIAL_LOST.search(content) for role, content in spoken):
        return
    if answers_in_wrong_language(spoken[0][1], spoken[1][1]):
        return
    messages = [{"role": role, "content": content} for role, content in turns]
    yield Document(" ".join(re.findall(r"\w+", spoken[0][1].lower())), {"messages": messages})


def answers_in_wrong_language(question: str, answer: str) -> bool:
    """Returns whether a Chinese question that does not ask for English has an English answer."""
    if num_han(question) < len(question) // 3 or _ASKS_FOR_ENGLISH.search(question):
        return False
    return num_han(answer) == 0 and len(re.findall(r"[A-Za-z]{3,}", answer)) > 12

"""Chats: OpenAI messages, Alpaca and ShareGPT records, brought to one form.

In: a JSON object. Out: a `Chat` of a system text and exchanges, or the reason why it is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.corpus.documents import BadLineError, DroppedError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        system: The system text, or None.
        exchanges: What the user says and what the assistant answers, in order; an answer of None
            is still to be given, and only the last can be.
    """

    system: str | None
    exchanges: tuple[tuple[str, str | None], ...]


def chat_of(record: Mapping[str, Any], key: str) -> Chat:
    """The chat in a record, whichever of the three formats it has.

    Args:
        record: The JSON object.
        key: The key of the list of messages, looked for before the formats' own.

    Raises:
        BadLineError: None of the formats' keys is there, or its content is of another type.
        DroppedError: Nothing can be learnt from it, or its turns are out of order.
    """
    for name in (key, "messages", "conversations", "conversation"):
        if name in record:
            system = record.get("system")
            turns = _turns(record[name])
            if isinstance(system, str) and system:  # ShareGPT keeps it beside the turns
                turns.insert(0, ("system", system))
            return chat_of_turns(turns, complete=True)
    if "instruction" in record:
        return _alpaca(record)
    raise BadLineError("no_chat_key")


def chat_of_turns(turns: Sequence[tuple[str, str]], *, complete: bool) -> Chat:
    """Puts turns into exchanges.

    Args:
        turns: Role ("system", "user" or "assistant") and text of each.
        complete: Whether every exchange needs its answer: a last turn of the user is cut off.
            Otherwise the last turn has to be the user's.

    Raises:
        DroppedError: There is nothing to learn, or the turns are out of order.
    """
    system: str | None = None
    exchanges: list[tuple[str, str | None]] = []
    previous = "begin"
    for role, text in turns:
        if role == "system":
            if previous != "begin":
                raise DroppedError("system_turn_not_first")
            system = text
        elif role == "user":
            if previous == "user":
                raise DroppedError("two_user_turns")
            exchanges.append((text, None))
        else:
            if previous != "user":
                raise DroppedError("answer_without_question")
            exchanges[-1] = (exchanges[-1][0], text)
        previous = role
    if complete and exchanges and exchanges[-1][1] is None:
        exchanges.pop()
    if not exchanges:
        raise DroppedError("no_answer")
    if any(not question.strip() for question, _ in exchanges):
        raise DroppedError("empty_question")
    if complete and any(not (answer or "").strip() for _, answer in exchanges):
        raise DroppedError("empty_answer")
    if not complete and exchanges[-1][1] is not None:
        raise DroppedError("no_question")
    return Chat(system or None, tuple(exchanges))


def _turns(messages: Any) -> list[tuple[str, str]]:
    """Roles and texts of a list of messages, in OpenAI's or ShareGPT's spelling."""
    if not isinstance(messages, list):
        raise BadLineError("messages_not_a_list")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadLineError("message_not_an_object")
        role = ROLES.get(str(message.get("role", message.get("from"))).lower())
        if role is None:
            raise DroppedError("unknown_role")
        turns.append((role, _content(message.get("content", message.get("value")))))
    return turns


def _content(content: Any) -> str:
    """A message's text; OpenAI allows it in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise DroppedError("content_not_text")


def _alpaca(record: Mapping[str, Any]) -> Chat:
    """Alpaca's keys: instruction, input, output, and at times system and history."""
    fields = {name: record.get(name) or "" for name in ("instruction", "input", "output", "system")}
    if not all(isinstance(text, str) for text in fields.values()):
        raise BadLineError("field_not_text")
    turns: list[tuple[str, str]] = []
    if fields["system"]:
        turns.append(("system", fields["system"]))
    for pair in record.get("history") or []:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise BadLineError("history_not_pairs")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    question = "\n\n".join(text for text in (fields["instruction"], fields["input"]) if text)
    turns += [("user", question), ("assistant", fields["output"])]
    return chat_of_turns(turns, complete=True)

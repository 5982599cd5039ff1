"""Converts OpenAI, ShareGPT, Alpaca and Dolly records to chats.

Each record is converted to a `Chat`, which has a system text and exchanges, or is dropped and
counted by reason. Fields that select which answers have loss (`weight`, `train`, `training`,
`loss`) are honored. A record with a field that a `Chat` cannot represent, such as tool calls, is
dropped, because its meaning would change without the field. The reason is the field's name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from megatron_chatflow.tokenizer.chat_template import Chat
from megatron_chatflow.tokenizer.documents import BadLineError, DroppedError

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

CHAT_KEYS = ("messages", "conversations", "conversation")
# The fields of OpenAI, axolotl and ms-swift that select whether a message has loss.
LOSS_FIELDS = ("weight", "train", "training", "loss")
# A message or record changes its meaning without these fields. Empty values count as absent.
UNSUPPORTED_FIELDS = {
    "message": ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    "record": ("tools", "functions", "images", "image", "videos", "video", "audios", "audio"),
}
_EMPTY_TEXTS = ("", "[]", "{}", "null")


class Turn(NamedTuple):
    """A message of a chat."""

    role: str  # "system", "user" or "assistant"
    text: str  # the text of the message
    loss: bool = True  # Whether the message has loss. Only used for answers.


def chat_of(record: Mapping[str, Any], key: str) -> Chat:
    """Extracts the chat of a JSON object in any of the supported formats.

    The list of messages is below ``key`` or one of `CHAT_KEYS`, in this order.

    Raises:
        BadLineError: The record has no key of a supported format, or a value has the wrong
            type.
        DroppedError: The chat has an unsupported field or role, contradictory loss fields, no
            answer with loss, or turns that are out of order.
    """
    for name in (key, *CHAT_KEYS):
        if record.get(name) is not None:
            _refuse_unsupported_fields(record, "record")
            turns = _turns(record[name])
            system = _text(record, "system")
            if system and turns and turns[0].role == "system":
                if turns[0].text.strip() != system.strip():
                    raise DroppedError("system_field_and_system_turn")
            elif system:  # ShareGPT stores it in a field of the record
                turns.insert(0, Turn("system", system))
            return chat_of_turns(turns)
    if record.get("instruction") is not None:
        _refuse_unsupported_fields(record, "record")
        return _alpaca(record)
    keys = ", ".join(sorted(str(name) for name in record))
    raise BadLineError("no_chat_key", f"no_chat_key (has {keys:.200})")


def chat_of_turns(turns: Sequence[Turn]) -> Chat:
    """Groups turns into exchanges. A last question without an answer is left out.

    Raises:
        DroppedError: There is no answer with loss, a text is empty, or the turns are out of order.
    """
    system: str | None = None
    exchanges: list[tuple[str, str | None]] = []
    untrained_answers: set[int] = set()
    previous = "begin"
    for role, text, loss in turns:
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
            if not loss:
                untrained_answers.add(len(exchanges) - 1)
        previous = role
    if exchanges and exchanges[-1][1] is None:
        exchanges.pop()
    if not exchanges:
        raise DroppedError("no_answer")
    if any(not question.strip() for question, _ in exchanges):
        raise DroppedError("empty_question")
    if any(not (answer or "").strip() for _, answer in exchanges):
        raise DroppedError("empty_answer")
    if len(untrained_answers) == len(exchanges):
        raise DroppedError("no_answer_with_loss")
    return Chat(system or None, tuple(exchanges), frozenset(untrained_answers))


def _turns(messages: Any) -> list[Turn]:
    if not isinstance(messages, list):
        raise BadLineError("messages_not_a_list")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadLineError("message_not_an_object")
        _refuse_unsupported_fields(message, "message")
        role = ROLES.get(str(_first_present(message, "role", "from")).lower())
        if role is None:
            raise DroppedError("unknown_role")
        loss = _loss(message, role)
        turns.append(Turn(role, _content(_first_present(message, "content", "value")), loss))
    return turns


def _first_present(fields: Mapping[str, Any], *names: str) -> Any:
    """Returns the first field that is present and not null. Parquet has null for missing fields."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _refuse_unsupported_fields(
    fields: Mapping[str, Any], kind: Literal["message", "record"]
) -> None:
    for name in UNSUPPORTED_FIELDS[kind]:
        value = fields.get(name)
        if value and not (isinstance(value, str) and value.strip() in _EMPTY_TEXTS):
            raise DroppedError(name)


def _loss(message: Mapping[str, Any], role: str) -> bool:
    """Returns whether a message has loss.

    A `weight` of 1 on a question is common and is ignored. Other loss on a message that is not an
    answer, contradicting fields, and values except 0 and 1 drop the record.
    """
    given = {name: message[name] for name in LOSS_FIELDS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DroppedError(f"{name}_neither_0_nor_1")
        if role != "assistant" and value and name != "weight":
            raise DroppedError(f"{name}_on_{role}_turn")
    if len({bool(value) for value in given.values()}) > 1 and role == "assistant":
        raise DroppedError("contradicting_loss_fields")
    return all(given.values())


def _content(content: Any) -> str:
    """Returns the text of a message. In the OpenAI format, it may be a list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise DroppedError("content_not_text")


def _text(record: Mapping[str, Any], *names: str) -> str:
    """Returns the text of a field that has several names, or "" if none of them is present."""
    texts = {name: record[name] for name in names if record.get(name) is not None}
    if not all(isinstance(text, str) for text in texts.values()):
        raise BadLineError("field_not_text")
    different = {text: name for name, text in reversed(texts.items()) if text}
    if len(different) > 1:
        raise DroppedError("_and_".join(different[text] for text in reversed(different)))
    return str(next(iter(different), ""))


def _alpaca(record: Mapping[str, Any]) -> Chat:
    """Converts a record of Alpaca, or of Dolly with `context` and `response`."""
    instruction, system = _text(record, "instruction"), _text(record, "system")
    context, answer = _text(record, "input", "context"), _text(record, "output", "response")
    turns: list[Turn] = []
    if system:
        turns.append(Turn("system", system))
    for pair in record.get("history") or []:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise BadLineError("history_not_pairs")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    question = "\n\n".join(text for text in (instruction, context) if text)
    turns += [Turn("user", question), Turn("assistant", answer)]
    return chat_of_turns(turns)

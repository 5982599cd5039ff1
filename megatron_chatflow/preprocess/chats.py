"""Chats: OpenAI messages, Alpaca and ShareGPT records, brought to one form.

A record becomes a `Chat` of a system text and exchanges, or a reason why it is left out. Fields
that choose which answers are learnt (`weight`, `train`, `training`, `loss`) are honoured. Records
whose meaning would be lost without a field that has no place in a `Chat`, such as calls of tools,
are left out under the name of that field.
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
# Of a message: whether its tokens are learnt, as OpenAI, axolotl and ms-swift spell it.
LOSS_FIELDS = ("weight", "train", "training", "loss")
# Without these a message or record would say something else. Empty values count as absent.
FIELDS_WITHOUT_A_PLACE = {
    "message": ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    "record": ("tools", "functions", "images", "image", "videos", "video", "audios", "audio"),
}
_EMPTY_TEXTS = ("", "[]", "{}", "null")


class Turn(NamedTuple):
    """What one side says.

    Attributes:
        role: "system", "user" or "assistant".
        text: What is said.
        loss: Whether it is learnt, if it is an answer.
    """

    role: str
    text: str
    loss: bool = True


def chat_of(record: Mapping[str, Any], key: str) -> Chat:
    """The chat in a record, whichever of the three formats it has.

    Args:
        record: The JSON object.
        key: The key of the list of messages, looked for before the formats' own.

    Raises:
        BadLineError: None of the formats' keys is there, or its content is of another type.
        DroppedError: Nothing can be learnt from it, or its turns are out of order.
    """
    for name in (key, *CHAT_KEYS):
        if record.get(name) is not None:
            _refuse_fields_without_a_place(record, "record")
            turns = _turns(record[name])
            system = _text(record, "system")
            if system and turns and turns[0].role == "system":
                if turns[0].text.strip() != system.strip():
                    raise DroppedError("system_field_and_system_turn")
            elif system:  # ShareGPT keeps it beside the turns
                turns.insert(0, Turn("system", system))
            return chat_of_turns(turns, complete=True)
    if record.get("instruction") is not None:
        _refuse_fields_without_a_place(record, "record")
        return _alpaca(record)
    keys = ", ".join(sorted(str(name) for name in record))
    raise BadLineError("no_chat_key", f"no_chat_key (has {keys:.200})")


def chat_of_turns(turns: Sequence[Turn], *, complete: bool) -> Chat:
    """Puts turns into exchanges.

    Args:
        turns: In order.
        complete: Whether every exchange needs its answer: a last turn of the user is cut off.
            Otherwise the last turn has to be the user's.

    Raises:
        DroppedError: There is nothing to learn, or the turns are out of order.
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
    if complete and len(untrained_answers) == len(exchanges):
        raise DroppedError("no_answer_with_loss")
    return Chat(system or None, tuple(exchanges), frozenset(untrained_answers))


def _turns(messages: Any) -> list[Turn]:
    """Roles and texts of a list of messages, in OpenAI's or ShareGPT's spelling."""
    if not isinstance(messages, list):
        raise BadLineError("messages_not_a_list")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadLineError("message_not_an_object")
        _refuse_fields_without_a_place(message, "message")
        role = ROLES.get(str(_first_given(message, "role", "from")).lower())
        if role is None:
            raise DroppedError("unknown_role")
        loss = _loss(message, role)
        turns.append(Turn(role, _content(_first_given(message, "content", "value")), loss))
    return turns


def _first_given(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of some fields that is there; parquet has null in those that are not."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _refuse_fields_without_a_place(
    fields: Mapping[str, Any], kind: Literal["message", "record"]
) -> None:
    for name in FIELDS_WITHOUT_A_PLACE[kind]:
        value = fields.get(name)
        if value and not (isinstance(value, str) and value.strip() in _EMPTY_TEXTS):
            raise DroppedError(name)


def _loss(message: Mapping[str, Any], role: str) -> bool:
    """Whether a message is learnt.

    Raises:
        DroppedError: Its fields contradict each other, say neither yes nor no, or ask for loss on
            what is no answer. (A weight of 1 on questions is common, and means nothing.)
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
    """A message's text; OpenAI allows it in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise DroppedError("content_not_text")


def _text(record: Mapping[str, Any], *names: str) -> str:
    """The text of a field, which may have several names but only one value; "" without one.

    Raises:
        BadLineError: It is not text.
        DroppedError: Two of the names have different texts.
    """
    texts = {name: record[name] for name in names if record.get(name) is not None}
    if not all(isinstance(text, str) for text in texts.values()):
        raise BadLineError("field_not_text")
    different = {text: name for name, text in reversed(texts.items()) if text}
    if len(different) > 1:
        raise DroppedError("_and_".join(different[text] for text in reversed(different)))
    return str(next(iter(different), ""))


def _alpaca(record: Mapping[str, Any]) -> Chat:
    """Alpaca's keys: instruction, input, output, and at times system and history.

    Dolly has context and response instead of input and output.
    """
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
    return chat_of_turns(turns, complete=True)

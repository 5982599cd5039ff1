"""Converts the records of chat corpora to chats.

The recognized records are lists of messages (OpenAI, ShareGPT), either below a key or as the whole
record, single questions with their answers (Alpaca, Dolly, and keys such as `prompt` and
`completion`), and records whose keys `ChatSettings.keys` names. Each is converted to a `Chat`, or
is dropped and counted by reason. Fields that select which messages have loss (`weight`, `train`,
`training`, `loss`) take precedence over `ChatSettings.train_on`. A record with a field that a
`Chat` cannot represent, such as images, is dropped, because its meaning would change without the
field. The reason is the field's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.chat_template import (
    CHAT_ROLES,
    REASONING_FIELDS,
    Chat,
    ChatMessage,
)
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
    "tool": "tool",
    "observation": "tool",
    "function": "function",
}
# ShareGPT stores the tool calls of an assistant as a message with this role.
_FUNCTION_CALL_ROLE = "function_call"

CHAT_KEYS = ("messages", "conversations", "conversation")
# Names of a question and its answer. Records with `instruction` are Alpaca's or Dolly's.
QUESTION_ANSWER_KEYS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
    ("input", "target"),
    ("inputs", "targets"),
)
_CONTEXT_KEYS = ("input", "context")
_SYSTEM_KEYS = ("system", "system_prompt")
# The fields of OpenAI, axolotl and ms-swift that select whether a message has loss.
LOSS_FIELDS = ("weight", "train", "training", "loss")
# A record changes its meaning without these fields. Empty values count as absent.
UNSUPPORTED_FIELDS = ("functions", "images", "image", "videos", "video", "audios", "audio")
# The fields of answers, and of results of tools, that are passed on to the template.
_CALL_FIELDS = ("tool_calls", "function_call")
_RESULT_FIELDS = ("name", "tool_call_id")
_EMPTY_TEXTS = ("", "[]", "{}", "null")
_MERGED = "\n\n"  # between the texts of merged turns

ChatKey = Literal[
    "messages", "role", "content", "prompt", "context", "answer", "system", "history", "tools"
]
CHAT_KEY_NAMES: tuple[ChatKey, ...] = (
    *("messages", "role", "content"),
    *("prompt", "context", "answer", "system", "history", "tools"),
)


@dataclass(frozen=True)
class ChatSettings:
    """Settings for reading chats from records and for selecting the messages with loss."""

    # Pairs of a name in `CHAT_KEY_NAMES` and the key of the record or message that has its content.
    # Names that are not given are recognized by the usual keys.
    keys: tuple[tuple[str, str], ...] = ()
    # whether a chat with consecutive turns of the system, the user or the assistant is dropped, or
    # the turns are merged with an empty line between them
    consecutive: Literal["drop", "merge"] = "drop"
    # The messages with loss: ("all",) for every answer, ("last",) for the last answer, or the names
    # of roles in `CHAT_ROLES`. Loss fields of a message take precedence.
    train_on: tuple[str, ...] = ("all",)

    def check(self) -> None:
        """Validates the settings.

        Raises:
            UserError: A name is unknown or is given twice.
        """
        for name, key in self.keys:
            if name not in CHAT_KEY_NAMES or not key:
                raise UserError(
                    f"--chat-keys {name}={key}: give NAME=KEY, where NAME is one of "
                    f"{', '.join(CHAT_KEY_NAMES)}"
                )
        if len(dict(self.keys)) < len(self.keys):
            given = " ".join(f"{name}={key}" for name, key in self.keys)
            raise UserError(f"--chat-keys {given}: give each name only once")
        if self.train_on in (("all",), ("last",)):
            return
        unknown = [name for name in self.train_on if name not in CHAT_ROLES]
        if unknown or not self.train_on:
            raise UserError(
                f"--train-on {' '.join(self.train_on)}: give all, last, or roles among "
                f"{', '.join(CHAT_ROLES)}"
            )


def parse_chat_key(text: str) -> tuple[str, str]:
    """Parses ``NAME=KEY``. Without an equals sign, the key is empty, which `check` refuses."""
    name, _, key = text.partition("=")
    return name, key


_DEFAULTS = ChatSettings()


def is_list_of_messages(value: Any, settings: ChatSettings) -> bool:
    """Returns whether a value is one chat: a list of messages, which all have a role and a content.

    The roles must be known, because other records may have a field `role` or `from` as well.
    """
    keys = dict(settings.keys)
    role_keys, content_keys = _role_keys(keys), (*_content_keys(keys), *_CALL_FIELDS)
    return (isinstance(value, list) and len(value) > 0) and (
        all(map(_is_role_and_text, value))
        or all(
            isinstance(message, dict)
            and _is_role(_first_present(message, *role_keys))
            and any(key in message for key in content_keys)
            for message in value
        )
    )


def begins_with_messages(data: bytes, settings: ChatSettings) -> bool:
    """Returns whether the first line of a file is a chat without an object around it."""
    line = data.lstrip().split(b"\n", 1)[0]
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return is_list_of_messages(value, settings) or (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(text, str) or _is_pair(text) for text in value)
    )


class Turn(NamedTuple):
    """A message of a record."""

    role: str  # one of `CHAT_ROLES`
    text: str  # the text of the message
    # whether the message has loss; None if no field of the message says so
    loss: bool | None = None
    fields: Mapping[str, Any] = {}  # other fields for the template, as in `ChatMessage`


def chat_of(
    record: Mapping[str, Any] | list[Any], key: str, settings: ChatSettings = _DEFAULTS
) -> Chat:
    """Extracts the chat of a JSON object, or of a list of messages, in any supported format.

    The list of messages of an object is below ``key`` or one of `CHAT_KEYS`, in this order, unless
    the settings name other keys.

    Raises:
        BadLineError: The record has no key of a supported format, or a value has the wrong
            type.
        DroppedError: The chat has an unsupported field or role, contradictory loss fields, no
            answer with loss, or turns that are out of order.
    """
    keys: dict[str, str] = dict(settings.keys)
    if isinstance(record, list):
        return chat_of_turns(_turns(record, keys), settings)
    if "prompt" in keys or "answer" in keys:
        return _question_chat(record, keys, settings)
    for name in [keys["messages"]] if "messages" in keys else (key, *CHAT_KEYS):
        if record.get(name) is not None:
            _refuse_unsupported_fields(record)
            turns = _turns(record[name], keys)
            system = _system(record, keys)
            if system and turns and turns[0].role == "system":
                if turns[0].text.strip() != system.strip():
                    raise DroppedError("system_field_and_system_turn")
            elif system:  # ShareGPT stores it in a field of the record
                turns.insert(0, Turn("system", system))
            return chat_of_turns(turns, settings, _tools(record, keys))
    if "messages" in keys:
        raise _no_key(record, f"no_key_{keys['messages']}")
    return _question_chat(record, keys, settings)


def chat_of_turns(
    turns: Sequence[Turn], settings: ChatSettings = _DEFAULTS, tools: Sequence[Any] = ()
) -> Chat:
    """Converts turns to a chat. Turns after the last answer are left out.

    Raises:
        DroppedError: There is no answer, no message has loss, a text is empty, or the turns are out
            of order.
    """
    kept = _without_repeated_roles(
        [turn for turn in turns if turn.role != "system" or turn.text], settings
    )
    while kept and kept[-1].role != "assistant":
        kept.pop()
    if not kept:
        raise DroppedError("no_answer")
    if next(turn.role for turn in kept if turn.role != "system") != "user":
        raise DroppedError("answer_without_question")
    if any(turn.role == "user" and not turn.text.strip() for turn in kept):
        raise DroppedError("empty_question")
    if any(
        turn.role == "assistant"
        and not turn.text.strip()
        and not any(name in turn.fields for name in _CALL_FIELDS)
        for turn in kept
    ):
        raise DroppedError("empty_answer")
    messages = tuple(
        ChatMessage(
            turn.role,
            turn.text,
            _is_selected(turn, k + 1 == len(kept), settings) if turn.loss is None else turn.loss,
            turn.fields,
        )
        for k, turn in enumerate(kept)
    )
    if not any(message.loss for message in messages):
        raise DroppedError("no_answer_with_loss")
    return Chat(messages, tuple(tools))


def _is_selected(turn: Turn, is_last: bool, settings: ChatSettings) -> bool:
    if settings.train_on == ("all",):
        return turn.role == "assistant"
    return is_last if settings.train_on == ("last",) else turn.role in settings.train_on


def _without_repeated_roles(turns: Sequence[Turn], settings: ChatSettings) -> list[Turn]:
    """Merges consecutive turns of a role, or raises an error. Tools may answer several times."""
    kept: list[Turn] = []
    for turn in turns:
        if not kept or turn.role != kept[-1].role or turn.role in ("tool", "function"):
            kept.append(turn)
            continue
        before = kept[-1]
        if settings.consecutive == "drop" or before.fields or turn.fields:
            raise DroppedError(f"two_{turn.role}_turns")
        if before.loss != turn.loss:
            raise DroppedError("merged_turns_differ_in_loss")
        kept[-1] = before._replace(text=f"{before.text}{_MERGED}{turn.text}")
    return kept


def _turns(messages: Any, keys: Mapping[str, str]) -> list[Turn]:
    """Converts a list of messages or its JSON text.

    A message is an object or a pair of a role and a text. Other texts, and pairs of texts, are
    alternating questions and answers.
    """
    messages = _parsed(messages)
    if not isinstance(messages, list):
        raise BadLineError("messages_not_a_list")
    if len(messages) > 1 and all(isinstance(text, str) for text in messages):
        return [Turn("assistant" if k % 2 else "user", text) for k, text in enumerate(messages)]
    role_keys, content_keys = _role_keys(keys), _content_keys(keys)
    if messages and all(map(_is_role_and_text, messages)):
        messages = [{role_keys[0]: role, content_keys[0]: text} for role, text in messages]
    elif messages and all(map(_is_pair, messages)):
        sides = ("user", "assistant")
        return [Turn(*turn) for pair in messages for turn in zip(sides, pair, strict=True)]
    names = {*role_keys, *content_keys}
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadLineError("message_not_an_object")
        has_more = not message.keys() <= names
        given_role = str(_first_present(message, *role_keys)).lower()
        content = _first_present(message, *content_keys)
        if given_role == _FUNCTION_CALL_ROLE:
            fields = {**_template_fields(message, "assistant"), "tool_calls": _tool_calls(content)}
            turns.append(Turn("assistant", "", _loss(message, "assistant"), fields))
            continue
        role = ROLES.get(given_role)
        if role is None:
            raise DroppedError("unknown_role")
        if not has_more:
            turns.append(Turn(role, _content(content)))
            continue
        fields = _template_fields(message, role)
        text = "" if content is None and fields else _content(content)
        turns.append(Turn(role, text, _loss(message, role), fields))
    return turns


def _role_keys(keys: Mapping[str, str]) -> tuple[str, ...]:
    return (keys["role"],) if "role" in keys else ("role", "from")


def _content_keys(keys: Mapping[str, str]) -> tuple[str, ...]:
    return (keys["content"],) if "content" in keys else ("content", "value")


def _is_role(name: Any) -> bool:
    role = str(name).lower()
    return role in ROLES or role == _FUNCTION_CALL_ROLE


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(t, str) for t in value)


def _is_role_and_text(value: Any) -> bool:
    return _is_pair(value) and _is_role(value[0])


def _parsed(value: Any) -> Any:
    """Returns a value, parsed if it is the JSON text of a list or object, as in some tables."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def _template_fields(message: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Returns the fields for the template: calls and reasoning of answers, names of results."""
    for name in (*_CALL_FIELDS, *REASONING_FIELDS):
        if role != "assistant" and not _is_empty(message.get(name)):
            raise DroppedError(f"{name}_on_{role}_turn")
    answer_fields = (*_CALL_FIELDS, *REASONING_FIELDS)
    names = {"assistant": answer_fields, "tool": _RESULT_FIELDS, "function": _RESULT_FIELDS}
    fields = {}
    for name in names.get(role, ()):
        value = message.get(name)
        if _is_empty(value):
            continue
        if name == "tool_calls":
            value = _tool_calls(value)
        elif name == "function_call":
            value = _with_parsed_arguments(_parsed(value))
        elif name in REASONING_FIELDS and not isinstance(value, str):
            raise DroppedError(f"{name}_not_text")
        fields[name] = value
    return fields


def _tool_calls(value: Any) -> list[Any]:
    """Returns the calls of an assistant in OpenAI's form, with arguments as objects."""
    parsed = _parsed(value)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise DroppedError("tool_calls_not_objects")
    return [
        {**call, "function": _with_parsed_arguments(call["function"])}
        if "function" in call
        else {"type": "function", "function": _with_parsed_arguments(call)}
        for call in calls
    ]


def _with_parsed_arguments(function: Any) -> Any:
    """Parses the arguments of a call, which OpenAI stores as text and templates write as JSON."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DroppedError("tool_calls_not_objects")
    return {
        name: _parsed(value) if name == "arguments" else value for name, value in function.items()
    }


def _tools(record: Mapping[str, Any], keys: Mapping[str, str]) -> list[Any]:
    tools = record.get(keys.get("tools", "tools"))
    if _is_empty(tools):
        return []
    tools = _parsed(tools)
    if not isinstance(tools, list):
        raise DroppedError("tools_not_a_list")
    return [_parsed(tool) for tool in tools]


def _first_present(fields: Mapping[str, Any], *names: str) -> Any:
    """Returns the first field that is present and not null. Parquet has null for missing fields."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _is_empty(value: Any) -> bool:
    return not value or (isinstance(value, str) and value.strip() in _EMPTY_TEXTS)


def _refuse_unsupported_fields(record: Mapping[str, Any]) -> None:
    for name in UNSUPPORTED_FIELDS:
        if not _is_empty(record.get(name)):
            raise DroppedError(name)


def _loss(message: Mapping[str, Any], role: str) -> bool | None:
    """Returns whether the fields of a message give it loss; None if they do not decide.

    A `weight` of 1 is OpenAI's default, which `--train-on` may restrict, and is common on
    questions, where it is ignored. Contradicting fields, and values except 0 and 1 drop the record.
    """
    given = {name: message[name] for name in LOSS_FIELDS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DroppedError(f"{name}_neither_0_nor_1")
    if role != "assistant" and given.get("weight"):
        del given["weight"]
    if len({bool(value) for value in given.values()}) > 1:
        raise DroppedError("contradicting_loss_fields")
    if not given or list(given) == ["weight"] and given["weight"]:
        return None
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


def _system(record: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    return _text(record, *((keys["system"],) if "system" in keys else _SYSTEM_KEYS))


def _question_chat(
    record: Mapping[str, Any], keys: Mapping[str, str], settings: ChatSettings
) -> Chat:
    """Converts a record with a question and its answer, and maybe the exchanges before them."""
    contexts: tuple[str, ...] = _CONTEXT_KEYS
    if "prompt" in keys or "answer" in keys:
        prompt, answer = _mapped_keys(record, keys)
        contexts = ()
    elif record.get("instruction") is not None:
        prompt, answer = "instruction", "output"
        _text(record, "output", "response")  # raises an error if they differ
        if not record.get("output"):
            answer = "response"
    else:
        prompt, answer = _found_keys(record)
        contexts = tuple(name for name in contexts if name != prompt)
    _refuse_unsupported_fields(record)
    question, context = record.get(prompt), ""
    if names := ((keys["context"],) if "context" in keys else contexts):
        context = _text(record, *names)
    system = _system(record, keys)
    turns = [Turn("system", system)] if system else []
    history = _parsed(record.get(keys.get("history", "history"))) or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise BadLineError("history_not_pairs")
    turns += _turns(history, keys)
    if isinstance(question, list):  # the messages before the answer
        if context or history:
            raise DroppedError("context_beside_messages")
        turns += _turns(question, keys)
    else:
        parts = (_text(record, prompt), context)
        turns.append(Turn("user", "\n\n".join(text for text in parts if text)))
    if isinstance(record.get(answer), list):
        turns += _turns(record[answer], keys)
    else:
        turns.append(Turn("assistant", _text(record, answer)))
    return chat_of_turns(turns, settings, _tools(record, keys))


def _mapped_keys(record: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[str, str]:
    """Returns the keys of the question and the answer, of which the settings name at least one."""
    prompts, answers = zip(*QUESTION_ANSWER_KEYS, strict=True)
    usual = {"prompt": ("instruction", *prompts), "answer": answers}
    names: list[str] = []
    for name, others in usual.items():
        candidates = (keys[name],) if name in keys else others
        present = [key for key in candidates if key in record]
        if not present:
            raise _no_key(record, f"no_key_{keys[name]}" if name in keys else "no_chat_key")
        names.append(next((key for key in present if record[key] is not None), present[0]))
    return names[0], names[1]


def _found_keys(record: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the usual keys of a question and its answer that a record has."""
    found = [
        (prompt, answer)
        for prompt, answer in QUESTION_ANSWER_KEYS
        if record.get(prompt) is not None and answer in record
    ]
    if not found:
        raise _no_key(record, "no_chat_key")
    answered = [keys for keys in found if record[keys[1]] is not None] or found[:1]
    if len({repr([record[key] for key in keys]) for keys in answered}) > 1:
        raise DroppedError("several_questions_or_answers")
    return answered[0]


def _no_key(record: Mapping[str, Any], reason: str) -> BadLineError:
    keys = ", ".join(sorted(str(name) for name in record))
    return BadLineError(reason, f"{reason} (has {keys:.200})")

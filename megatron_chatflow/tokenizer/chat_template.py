"""Applies Jinja chat templates as transformers does, with exact loss spans.

The position of each answer in the rendered text is found in one of two ways. A template can mark
its answers with `{% generation %}`. Otherwise the chat is rendered twice per answer: up to the
answer, with the generation prompt, and up to the end of the answer. If both results are prefixes of
the whole text, the answer is what the second adds to the first.

Some templates rewrite earlier answers: Qwen3's removes their reasoning. The second result is then
no prefix of the whole text, and the answer ends with the first control token after its prompt,
which must be the one that ends a turn. A template that can be located in neither way is rejected.

The span of another message with loss is found by a rendering in which the message's text is
replaced, which shows where its text begins.

Templates run in jinja2's sandbox (`template_sandbox`). If the content of a chat contains the name
of a control token, that name must remain text. It is therefore split by a guard character that the
chat does not contain, and the guard is removed after rendering.
"""

import json
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.documents import (
    Document,
    DroppedError,
    Segment,
    TemplateLimitError,
)

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # reserved for internal use
MAX_SOURCE_CHARACTERS = 1 << 20
SYSTEM = "Probe of the system text."
PROBE = (("Probe question one?", "Probe answer one."), ("Probe question two?", "Probe answer two."))
Message = dict[str, Any]
CHAT_ROLES = ("system", "user", "assistant", "tool", "function")
# Fields with the reasoning of an answer. A template reads at most one of them.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# Variables of every template, which `template_variables` cannot set.
_OWN_VARIABLES = (
    "messages",
    "tools",
    "add_generation_prompt",
    "generation_begin",
    "generation_end",
)

# Files and folders with chat templates in a model's folder.
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_PROCESSOR_TEMPLATE = "chat_template.json"
_DEFAULT = "default"


class ChatMessage(NamedTuple):
    """A message of a chat."""

    role: str  # one of `CHAT_ROLES`
    text: str  # the text of the message; may be empty if an assistant calls tools
    loss: bool = False  # whether the message has loss
    # other fields for Jinja templates: `tool_calls`, `function_call` and `REASONING_FIELDS` of an
    # assistant, `name` and `tool_call_id` of a result
    fields: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Chat:
    """A conversation, which ends with a message of the assistant."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Any, ...] = ()  # descriptions of the tools that the assistant may call

    @property
    def answers(self) -> list[ChatMessage]:
        """The messages of the assistant, in order."""
        return [message for message in self.messages if message.role == "assistant"]


TemplateVariables = tuple[tuple[str, bool | int | float | str | None], ...]


def template_variables(text: str) -> TemplateVariables:
    """Parses the variables of `JinjaTemplate.variables` from a JSON object, sorted by name.

    Raises:
        UserError: If it is not an object of numbers, texts, booleans and nulls, or a name is one
            that every template has.
    """
    flag = f"--chat-template-kwargs {text}"
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{flag}: is not JSON ({error}); write '{{\"name\": value}}'") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag}: is not a JSON object; write '{{\"name\": value}}'")
    for name, value in content.items():
        if name in _OWN_VARIABLES:
            raise UserError(f"{flag}: {name} is given by the chat; remove it")
        if isinstance(value, list | dict):
            raise UserError(f"{flag}: {name} is no text, number, boolean or null; use one of these")
    return tuple(sorted(content.items()))


def with_default_variables(source: str, variables: Mapping[str, object]) -> str:
    """Returns a template's Jinja source that sets variables that its caller leaves undefined.

    The values are texts, finite numbers, booleans or None. A name that templates cannot read as a
    variable, and a value of another type, are left out.
    """
    lines = []
    for name, value in sorted(variables.items()):
        reserved = keyword.iskeyword(name) or name in ("true", "false", "none")
        if name.isascii() and name.isidentifier() and not reserved:
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if value is None or is_number or isinstance(value, str):
                literal = "none" if value is None else json.dumps(value, ensure_ascii=False)
                condition = f"{{% if {name} is not defined %}}"
                lines.append(f"{condition}{{% set {name} = {literal} %}}{{% endif %}}")
    prefix = "".join(lines)
    if source.startswith(prefix):
        return source
    # Behind a block, transformers leaves out a newline, here instead of one that is text.
    return prefix + ("\n" if prefix and source.startswith("\n") else "") + source


def chat_of_exchanges(system: str | None, exchanges: Sequence[tuple[str, str]]) -> Chat:
    """Returns the chat of questions and answers. Every answer has loss."""
    messages = [ChatMessage("system", system)] if system else []
    for question, answer in exchanges:
        messages += [ChatMessage("user", question), ChatMessage("assistant", answer, loss=True)]
    return Chat(tuple(messages))


@dataclass(frozen=True)
class _Rendered:
    """A rendered chat, in whose text `guard` splits the names of control tokens in the content.

    `spans` are the begin and end of each answer, `other_spans` those of other messages with loss,
    and `cut_points` are the positions after which the chat may be cut, all as character offsets in
    `text`.
    """

    text: str
    guard: str
    spans: list[tuple[int, int]]
    other_spans: list[tuple[int, int]]
    cut_points: list[int]


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template."""

    name: str  # name of the template's file, for messages
    source: str  # Jinja source
    # The tokenizer's control tokens. Where the template writes them, they are encoded as tokens and
    # not as text.
    control_tokens: tuple[str, ...] = ()
    # names and values of the template variables `bos_token`, `eos_token` and so on
    special_tokens: tuple[tuple[str, str], ...] = ()
    # names and values of further variables, such as `enable_thinking`; see `template_variables`
    variables: TemplateVariables = ()

    def document(self, chat: Chat, loss: str) -> Document:
        """Renders a chat as a document.

        With the loss "response", the messages with loss and their ends have loss. With "all", every
        token has loss except answers without loss. The document may be cut after each answer that
        no result of a tool follows, if the text up to that point equals the rendering of the chat
        up to that answer.

        Raises:
            DroppedError: If the template rejects the chat, does not have one of its roles or
                fields, or the messages with loss cannot be located.
        """
        self._refuse_missing(chat)
        rendered = self._rendered(chat)
        answers = chat.answers
        if not all(answer.loss for answer in answers) and len(rendered.spans) != len(answers):
            raise DroppedError("template_inconsistent")  # spans cannot be matched to answers
        excepted = [
            span for span, answer in zip(rendered.spans, answers, strict=False) if not answer.loss
        ]
        spans = [*rendered.spans, *rendered.other_spans]
        cuts = {0, len(rendered.text), *rendered.cut_points}
        cuts.update(offset for span in spans for offset in span)
        offsets = sorted(cuts)
        segments: list[Segment] = []
        cut_points = []
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
            has_loss = loss == "all" or any(a <= begin and end <= b for a, b in spans)
            has_loss = has_loss and not any(a <= begin and end <= b for a, b in excepted)
            segments += self._segments(rendered.text[begin:end], rendered.guard, has_loss)
            if end in rendered.cut_points:
                cut_points.append(len(segments))
        return Document(tuple(segments), tuple(cut_points))

    def check(self) -> None:
        """Checks the template on a chat of two exchanges.

        Raises:
            UserError: If the template fails, or the answers cannot be located.
        """
        try:
            try:
                rendered = self._rendered(chat_of_exchanges(SYSTEM, PROBE))
            except TemplateLimitError:
                raise
            except DroppedError:  # some templates reject a system message
                rendered = self._rendered(chat_of_exchanges(None, PROBE))
        except TemplateLimitError as error:
            raise self._limit_error(error) from error
        except DroppedError as error:
            why = "the text of a chat does not begin with the text of its first turns"
            if error.__cause__ is not None:
                why = str(error.__cause__) or type(error.__cause__).__name__
            if "strftime_now" in why:
                raise UserError(
                    f"chat template cannot be trained on: {self.name}: it writes the current date "
                    "(strftime_now) into chats, but a corpus must not depend on the date: use a "
                    "copy of the template with a fixed date"
                ) from error
            raise UserError(
                f"chat template cannot be trained on: {self.name}: {why}: mark its answers with "
                "{% generation %} and {% endgeneration %}"
            ) from error
        answers = [rendered.text[begin:end] for begin, end in rendered.spans]
        fits = len(answers) == len(PROBE) and all(
            answer in text and question not in "".join(answers)
            for text, (question, answer) in zip(answers, PROBE, strict=True)
        )
        if not fits:
            raise UserError(
                f"chat template cannot be trained on: {self.name}: in a chat with two answers, "
                f"it marks {answers!r:.200} as answers: mark its answers with {{% generation %}}"
            )

    def turn_end(self) -> str | None:
        """Returns the control token that ends an answer, or None if it cannot be determined.

        Raises:
            UserError: If the template exceeds a limit.
        """
        pattern = self._pattern
        for system in (SYSTEM, None):  # some templates reject a system message
            try:
                text = self._render(self._messages(chat_of_exchanges(system, PROBE), ""))
            except TemplateLimitError as error:
                raise self._limit_error(error) from error
            except DroppedError:
                continue
            _, found, behind = text.rpartition(PROBE[-1][1])
            match = pattern.search(behind) if found and pattern else None
            return match[0] if match else None
        return None

    def _limit_error(self, error: TemplateLimitError) -> UserError:
        return UserError(
            f"chat template cannot be used: {self.name}: it {error.limit} for a chat with two "
            "answers: correct it, or use another template"
        )

    def _refuse_missing(self, chat: Chat) -> None:
        """Raises an error if the template does not have a role or a field of the chat.

        Many templates skip messages with roles that they do not have.
        """
        fields = {name for message in chat.messages for name in message.fields}
        names = [name for name in ("tool_calls", "function_call") if name in fields]
        for name in [*(["tools"] if chat.tools else []), *names]:
            if not re.search(rf"\b{name}\b", self.source):
                raise DroppedError(name)
        for name in REASONING_FIELDS:  # ordinary words, so only an access to the field counts
            if name in fields and not re.search(rf"[.\[(]\s*['\"]?{name}\b", self.source):
                raise DroppedError(name)
        roles = tuple(message.role for message in chat.messages)
        if set(roles[1:]) <= {"user", "assistant"}:
            return
        if missing := _missing_roles(self, roles):
            raise DroppedError(f"{missing[0]}_not_in_template")

    def _rendered(self, chat: Chat) -> _Rendered:
        others = [chat.tools, *(message.fields for message in chat.messages)]
        whole = "".join([*(message.text for message in chat.messages), *map(_texts_in, others)])
        unused = [c for c in NONCHARACTERS if c not in whole and c not in self.source]
        if len(unused) < 4:
            raise DroppedError("noncharacters")
        guard, begin, end, probe = unused[:4]
        messages = self._messages(chat, guard)
        tools = self._guarded(list(chat.tools), guard)
        is_marked = "generation" in _tags(self.source)
        marks = {"generation_begin": begin, "generation_end": end} if is_marked else {}

        def part_of(count: int, ask: bool = False) -> str:
            return self._render(messages[:count], ask, marks, tools)

        def span_of(k: int, whole: str) -> tuple[int, int]:
            """Returns the span of a message that is no answer."""
            replaced = [*messages[:k], {**messages[k], "content": probe}]
            shown = _without_marks(self._render(replaced, False, marks, tools), begin, end)[0]
            part = _without_marks(part_of(k + 1), begin, end)[0]
            prompt, found, _ = shown.partition(probe)
            if not (found and whole.startswith(part) and part.startswith(prompt)):
                raise DroppedError("template_inconsistent")
            return len(prompt), self._end_of_answer(part, len(prompt))

        text = part_of(len(messages))
        asked = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        parts_until_answer = [part_of(k + 1) for k in asked[:-1]] + [text]
        results = ("tool", "function")
        may_cut = [messages[k + 1]["role"] not in results for k in asked[:-1]] + [True]
        others_with_loss = [
            k for k, m in enumerate(chat.messages) if m.loss and m.role != "assistant"
        ]
        if is_marked:
            plain, spans = _without_marks(text, begin, end)
            beginnings = [_without_marks(part, begin, end)[0] for part in parts_until_answer]
            consistent = all(plain.startswith(part) for part in beginnings)
            text = plain
            parts_until_answer = beginnings if consistent else []
        else:
            spans = []
            always_asks = _always_asks(self)
            for k, part in zip(asked, parts_until_answer, strict=True):
                prompt = part_of(k, ask=True)
                if not always_asks and text.startswith(part) and part.startswith(prompt):
                    spans.append((len(prompt), self._end_of_answer(part, len(prompt))))
                    continue
                if missing := _missing_roles(self, tuple(m["role"] for m in messages)):
                    raise DroppedError(f"{missing[0]}_not_in_template")
                if not text.startswith(prompt):  # such as a prompt that forbids reasoning
                    answer = {"role": "assistant", "content": probe}
                    replaced = [*messages[:k], answer, *messages[k + 1 :]]
                    prompt = self._render(replaced, False, marks, tools).partition(probe)[0]
                ending = self._pattern.search(text, len(prompt)) if self._pattern else None
                if not ending or ending[0] != _turn_end(self) or not text.startswith(prompt):
                    raise DroppedError("template_inconsistent")
                spans.append((len(prompt), ending.end()))
            if always_asks:  # remove the prompt of an answer after the last one
                text = text[: spans[-1][1]]
            parts_until_answer = [
                part if text.startswith(part) else "" for part in parts_until_answer[:-1]
            ] + [text]
        cut_points = [
            len(part)
            for part, may in zip(parts_until_answer, may_cut, strict=False)
            if may and part
        ]
        other_spans = [span_of(k, text) for k in others_with_loss]
        return _Rendered(text, guard, spans, other_spans, cut_points)

    def _messages(self, chat: Chat, guard: str) -> list[Message]:
        messages = [
            {"role": message.role, "content": message.text, **message.fields}
            for message in chat.messages
        ]
        return [
            {name: v if name == "role" else self._guarded(v, guard) for name, v in m.items()}
            for m in messages
        ]

    def _guarded(self, value: Any, guard: str) -> Any:
        """Splits the names of control tokens in all texts of a value by the guard character."""
        pattern = self._pattern
        if pattern is None:
            return value
        return _with_texts(
            value, lambda text: pattern.sub(lambda m: f"{m[0][0]}{guard}{m[0][1:]}", text)
        )

    def _render(
        self,
        messages: list[Message],
        ask: bool = False,
        marks: Mapping[str, str] | None = None,
        tools: Sequence[Any] = (),
    ) -> str:
        variables: dict[str, Any] = {"messages": messages, "add_generation_prompt": ask}
        if tools:
            variables["tools"] = tools
        variables |= dict(self.variables) | dict(self.special_tokens) | dict(marks or {})
        try:
            return render(self.source, variables)
        except (DroppedError, UserError):
            raise
        except Exception as error:  # a template can raise any exception
            raise DroppedError("template_refused") from error

    def _end_of_answer(self, text: str, begin: int) -> int:
        """Returns the end of an answer, without white space after its last control token."""
        pattern = self._pattern
        ends = [match.end() for match in pattern.finditer(text, begin)] if pattern else []
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    @property
    def _pattern(self) -> re.Pattern[str] | None:
        return _pattern_of(self.control_tokens)

    def _segments(self, text: str, guard: str, loss: bool) -> list[Segment]:
        segments: list[Segment] = []
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            segments.append(Segment(text[position : match.start()].replace(guard, ""), loss))
            segments.append(Segment(match[0], loss, "control"))
            position = match.end()
        segments.append(Segment(text[position:].replace(guard, ""), loss))
        return [segment for segment in segments if segment.text]


@lru_cache(maxsize=1 << 12)
def _missing_roles(template: JinjaTemplate, roles: tuple[str, ...]) -> list[str]:
    """Returns the roles of a chat whose messages do not appear in its rendering.

    The list is empty if the template rejects the chat, because its rejection may depend on the
    texts.
    """
    probes = [f"Probe of message {k}." for k in range(len(roles))]
    messages = [{"role": role, "content": probe} for role, probe in zip(roles, probes, strict=True)]
    try:
        text = template._render(messages)
    except DroppedError:
        return []
    return [role for role, probe in zip(roles, probes, strict=True) if probe not in text]


@lru_cache(maxsize=1 << 6)
def _turn_end(template: JinjaTemplate) -> str | None:
    return template.turn_end()


@lru_cache(maxsize=1 << 6)
def _always_asks(template: JinjaTemplate) -> bool:
    """Returns whether a template writes the prompt of an answer even after the last answer.

    The original template of LLaMA 3 does, because it ignores `add_generation_prompt`.
    """
    messages = template._messages(chat_of_exchanges(None, PROBE), "")
    try:
        chat, asked = (template._render(messages, ask) for ask in (False, True))
    except TemplateLimitError:
        raise
    except DroppedError:
        return False
    (_, first_answer), (second_question, last_answer) = PROBE
    between = chat.partition(first_answer)[2].partition(second_question)[0]
    return chat == asked and not between.startswith(chat.rpartition(last_answer)[2])


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Applies a function to every text in nested lists and objects, including the objects' keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_with_texts(item, change) for item in value]
    if isinstance(value, Mapping):
        return {_with_texts(key, change): _with_texts(item, change) for key, item in value.items()}
    return value


def _texts_in(value: Any) -> str:
    """Returns all texts in nested lists and objects, including the objects' keys, joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "".join(f"{key}{_texts_in(item)}" for key, item in value.items())
    return "".join(map(_texts_in, value)) if isinstance(value, list | tuple) else ""


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Renders a chat template within the limits on time, steps and characters.

    The variables are `messages`, `add_generation_prompt`, and the special tokens by name.

    Raises:
        UserError: If jinja2 is not installed, or the source is too large.
        TemplateLimitError: If the rendering exceeds a limit.
        Exception: Any other error of the template.
    """
    template = _compiled(source)
    text: str = template.environment.render(template, variables)
    return text


def read_chat_template(path: str | Path) -> JinjaTemplate:
    """Reads a chat template from a path that the user specified.

    Args:
        path: A file of Jinja source, a JSON file with the source under `chat_template`, or a
            model's folder. A path to `tokenizer_config.json` is treated as a path to its folder,
            because `chat_template.jinja` in the same folder has precedence.

    Raises:
        UserError: If the path cannot be read, contains no template, or is not valid Jinja.
    """
    file = Path(path)
    if file.is_dir() or (file.name == _TOKENIZER_CONFIG and file.is_file()):
        folder = file if file.is_dir() else file.parent
        found = find_chat_template(folder)
        if found is None:
            raise UserError(
                f"no chat template: {file}: neither {CHAT_TEMPLATE_FILE} nor {_TOKENIZER_CONFIG} "
                "in this folder has one: use a Jinja file"
            )
        return found
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read chat template: {file}: {error.strerror}") from error
    if file.suffix == ".json":
        return _checked(file, _default_of(file, _templates_of_json(file, data)))
    return _checked(file, _decoded(file, data))


def find_chat_template(folder: Path) -> JinjaTemplate | None:
    """Finds the default chat template in a model's folder, as transformers does; None without one.

    Raises:
        UserError: If a file cannot be read or is not valid Jinja, or no template is the
            default.
    """
    try:
        files = {name: (folder / name).read_bytes() for name in chat_template_names(folder)}
    except OSError as error:
        raise UserError(f"cannot read chat template: {folder}: {error.strerror}") from error
    templates = chat_templates_in(files, folder)
    if not templates:
        return None
    is_jinja = CHAT_TEMPLATE_FILE in files
    file = folder / (CHAT_TEMPLATE_FILE if is_jinja else _TOKENIZER_CONFIG)
    return _checked(file, _default_of(file, templates))


def chat_template_names(folder: Path) -> list[str]:
    """Lists the files in a model's folder that may contain chat templates, as relative names."""
    names = [CHAT_TEMPLATE_FILE, _TOKENIZER_CONFIG, _PROCESSOR_TEMPLATE]
    names += sorted(
        f"{CHAT_TEMPLATE_FOLDER}/{path.name}"
        for path in (folder / CHAT_TEMPLATE_FOLDER).glob("*.jinja")
    )
    return [name for name in names if (folder / name).is_file()]


def chat_templates_in(files: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Extracts the chat templates by name, such as `default`, from the small files of a folder.

    As in transformers, `chat_template.jinja` and `additional_chat_templates/NAME.jinja` replace the
    templates in `tokenizer_config.json`. `chat_template.json`, which older versions of transformers
    wrote for processors, has the lowest precedence. The folder is named in messages.

    Raises:
        UserError: If a file is not valid UTF-8 or JSON.
    """
    templates: dict[str, str] = {}
    for name, data in files.items():
        path = PurePosixPath(name)
        if name == CHAT_TEMPLATE_FILE:
            templates[_DEFAULT] = _decoded(folder / name, data)
        elif str(path.parent) == CHAT_TEMPLATE_FOLDER and path.suffix == ".jinja":
            templates[path.stem] = _decoded(folder / name, data)
    for name in (_TOKENIZER_CONFIG, _PROCESSOR_TEMPLATE):
        if not templates and name in files:
            templates = _templates_of_json(folder / name, files[name])
    return templates


def _templates_of_json(file: Path, data: bytes) -> dict[str, str]:
    """Returns the templates under `chat_template` by name; empty if it is missing or null."""
    try:
        content = json.loads(data)
        template = content.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        elif template is not None and not isinstance(template, dict):
            template = {_DEFAULT: template}
        template = template or {}
        if not all(isinstance(text, str) for item in template.items() for text in item):
            raise TypeError("chat_template is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"no chat template: {file}: {error}: use a Jinja file") from error
    return template


def _default_of(file: Path, templates: Mapping[str, str]) -> str:
    if _DEFAULT in templates:
        return templates[_DEFAULT]
    has = (
        f"has only {', '.join(templates)}, and none is called default" if templates else "has none"
    )
    raise UserError(f"no chat template: {file}: {has}: use a Jinja file")


def _decoded(file: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"no chat template: {file}: {error}: use a Jinja file") from error


def _checked(file: Path, source: str) -> JinjaTemplate:
    try:
        _compiled(source)
    except UserError:
        raise
    except Exception as error:  # jinja2's errors, and Python's for source nested too deeply
        line = getattr(error, "lineno", None)
        raise UserError(f"not a Jinja template: {file}{line and f':{line}' or ''}: {error}") from (
            error
        )
    return JinjaTemplate(file.name, source)


@cache
def _compiled(source: str) -> Any:
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise UserError(
            f"chat template too large: {len(source)} characters: the maximum is "
            f"{MAX_SOURCE_CHARACTERS}"
        )
    try:
        from megatron_chatflow.tokenizer.template_sandbox import LimitedEnvironment
    except ImportError as error:
        raise UserError("a chat template needs jinja2: pip install jinja2") from error
    return LimitedEnvironment().from_string(source)


@cache
def _tags(source: str) -> frozenset[str]:
    return frozenset(re.findall(r"\{%[-+]?\s*(\w+)", source))


@cache
def _pattern_of(names: tuple[str, ...]) -> re.Pattern[str] | None:
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _without_marks(text: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """Removes the marks of answers. Returns the text and the span of each answer in it."""
    plain = ""
    spans: list[tuple[int, int]] = []
    for piece in re.split(f"([{begin}{end}])", text):
        if piece == begin:
            spans.append((len(plain), len(plain)))
        elif piece == end and spans:
            spans[-1] = (spans[-1][0], len(plain))
        else:
            plain += piece
    return plain, [span for span in spans if span[0] < span[1]]

"""The built-in chat templates.

`chatflow`, `llama2` and `chatml` exist twice: as a function that returns an exchange as segments,
with loss on the messages that have loss, and as Jinja source that produces the same text in
transformers. The templates of `FAMILY_TEMPLATES` are Jinja source only. They write what the chat
models of a family read, for a base model of the family without a template of its own. All have a
system text only at the beginning, and no tools.

`chatflow` is the format of the paper, with `### Instruction:` and `### Response:`. Every answer
ends with the tokenizer's end-of-sequence token. Only the templates of LLaMA 3 and Mistral write a
token, BOS, at the beginning of a text.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.chat_template import (
    Chat,
    ChatMessage,
    JinjaTemplate,
    read_chat_template,
)
from megatron_chatflow.tokenizer.documents import Document, DroppedError, Segment

Exchange = tuple[list[Segment], list[Segment]]  # prompt and answer of one exchange


def _texts(*parts: tuple[str, bool]) -> list[Segment]:
    """Returns segments of texts with or without loss. Consecutive equal ones are joined."""
    segments: list[Segment] = []
    text, loss = parts[0]
    for more, has_loss in parts[1:]:
        if has_loss == loss:
            text += more
        else:
            segments.append(Segment(text, loss))
            text, loss = more, has_loss
    return [*segments, Segment(text, loss)]


def _control(name: str, loss: bool = False) -> Segment:
    return Segment(name, loss, "control")


def _end(loss: bool) -> Segment:
    return Segment("", loss, "end")


def _chatflow(
    system: ChatMessage | None, question: ChatMessage, answer: ChatMessage, number: int
) -> Exchange:
    parts = [] if system is None else [(system.text.strip(), system.loss), ("\n\n", False)]
    parts += [("### Instruction:\n", False), (question.text.strip(), question.loss)]
    prompt = _texts(*parts, ("\n\n### Response:\n", False))
    return prompt, [Segment(answer.text.strip(), answer.loss), _end(answer.loss)]


def _llama2(
    system: ChatMessage | None, question: ChatMessage, answer: ChatMessage, number: int
) -> Exchange:
    parts = [("[INST] ", False)]
    if system is not None:
        parts += [("<<SYS>>\n", False), (system.text.strip(), system.loss)]
        parts.append(("\n<</SYS>>\n\n", False))
    prompt = _texts(*parts, (question.text.strip(), question.loss), (" [/INST]", False))
    return prompt, [Segment(f" {answer.text.strip()} ", answer.loss), _end(answer.loss)]


def _chatml(
    system: ChatMessage | None, question: ChatMessage, answer: ChatMessage, number: int
) -> Exchange:
    prompt = [] if system is None else _chatml_message(system)
    if number > 0:
        prompt.append(Segment("\n", False))
    prompt += _chatml_message(question)
    prompt += [_control("<|im_start|>"), Segment("assistant\n", False)]
    loss = answer.loss
    return prompt, [Segment(answer.text, loss), _control("<|im_end|>", loss), _end(loss)]


def _chatml_message(message: ChatMessage) -> list[Segment]:
    texts = _texts((f"{message.role}\n", False), (message.text, message.loss))
    end = [_control("<|im_end|>", message.loss), Segment("\n", False)]
    return [_control("<|im_start|>"), *texts, *end]


TEMPLATES: dict[str, Callable[[ChatMessage | None, ChatMessage, ChatMessage, int], Exchange]] = {
    "chatflow": _chatflow,
    "llama2": _llama2,
    "chatml": _chatml,
}
"""Each template takes the system message (of the first exchange), the question, the answer and the
number of the exchange."""

# The same templates as Jinja source, with the variable names that transformers uses.
_JINJA_HEAD = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
"""
JINJA_TEMPLATES = {
    "chatflow": _JINJA_HEAD
    + """\
{%- if system -%}{{ system | trim + '\\n\\n' }}{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n### Response:\\n' }}
{%- else -%}
{{ message['content'] | trim + eos_token }}
{%- endif -%}
{%- endfor -%}""",
    "llama2": _JINJA_HEAD
    + """\
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{ '[INST] ' }}
{%- if loop.first and system -%}
{{ '<<SYS>>\\n' + system | trim + '\\n<</SYS>>\\n\\n' }}
{%- endif -%}
{{ message['content'] | trim + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}""",
    "chatml": _JINJA_HEAD
    + """\
{%- if system -%}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{{ '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n<|im_start|>assistant\\n' }}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- if eos_token != '<|im_end|>' -%}{{ eos_token }}{%- endif -%}
{%- endif -%}
{%- endfor -%}""",
}


# Ends the rendering of a chat that a template of a family would write wrongly.
_ROLES = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{ raise_exception('the template has no role ' + message['role']) }}
{%- elif message['role'] == 'system' and not loop.first -%}
{{ raise_exception('the system message is not the first') }}
{%- endif -%}
{%- endfor -%}
"""
_LLAMA3_TURNS = """\
{%- for message in turns -%}
{{ header + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ header + 'assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
_LLAMA3_HEAD = _ROLES + "{%- set header = '<|start_header_id|>' -%}{{ bos_token }}"
_QWEN_PROMPT = """\
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def _qwen(default_system: str) -> str:
    """Returns ChatML with a system message for every chat that has none."""
    return (
        _ROLES
        + f"""\
{{%- if messages[0]['role'] != 'system' -%}}
{{{{ '<|im_start|>system\\n{default_system}<|im_end|>\\n' }}}}
{{%- endif -%}}
"""
        + """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
"""
        + _QWEN_PROMPT
    )


def _mistral(closing: str, with_system: str, answer: str) -> str:
    """Returns a template of Mistral, whose system text stands in one of the questions.

    ``closing`` ends a question, ``with_system`` is the condition of the question with the system
    text, and ``answer`` is the expression of an answer's text.
    """
    return (
        _ROLES
        + _JINJA_HEAD
        + f"""\
{{{{ bos_token }}}}
{{%- for message in turns -%}}
{{%- if message['role'] == 'user' -%}}
{{{{ '[INST] ' + (system + '\\n\\n' if system and {with_system} else '') + message['content'] }}}}
{{{{- '{closing}' }}}}
{{%- else -%}}
{{{{ ' ' + {answer} + eos_token }}}}
{{%- endif -%}}
{{%- endfor -%}}"""
    )


FAMILY_TEMPLATES = {
    "llama3": _LLAMA3_HEAD + "{%- set turns = messages -%}" + _LLAMA3_TURNS,
    # Also of LLaMA 3.2 and 3.3. Meta's template writes the current date, if it is given a clock.
    "llama3.1": _LLAMA3_HEAD
    + _JINJA_HEAD
    + """\
{{ header + 'system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' }}
{{- (date_string or '26 Jul 2024') + '\\n\\n' + system | trim + '<|eot_id|>' }}
"""
    + _LLAMA3_TURNS,
    "qwen2": _qwen("You are a helpful assistant."),
    "qwen2.5": _qwen("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    # Writes the reasoning of an answer only after the last question.
    "qwen3": _ROLES
    + """\
{%- for message in messages -%}
{%- set answer, thought = message['content'], '' -%}
{%- if message['role'] == 'assistant' -%}
{%- if message['reasoning_content'] -%}
{%- set thought = message['reasoning_content'] -%}
{%- elif '</think>' in answer -%}
{%- set thought = answer.split('</think>')[0].split('<think>')[-1] -%}
{%- set answer = answer.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.last -%}
{%- set thought = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -%}
{%- set answer = thought + answer.lstrip('\\n') -%}
{%- endif -%}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' + answer + '<|im_end|>\\n' }}
{%- endfor -%}
"""
    + _QWEN_PROMPT
    + """\
{%- if add_generation_prompt and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}""",
    # As the tokenizers v1 and v3 of mistral-common: v3 has control tokens for [INST] and [/INST],
    # puts the system text into the last question, and removes spaces at the end of an answer.
    "mistral-v1": _mistral(" [/INST]", "loop.first", "message['content']"),
    "mistral-v3": _mistral(
        "[/INST]", "loop.index0 >= turns | length - 2", "message['content'].rstrip(' ')"
    ),
}
JINJA_TEMPLATES |= FAMILY_TEMPLATES


def template_source(asked: str) -> str:
    """Returns the Jinja source of a template: a name in `JINJA_TEMPLATES`, or a file or folder.

    Raises:
        UserError: The template does not exist or cannot be read.
    """
    if asked in JINJA_TEMPLATES:
        return JINJA_TEMPLATES[asked]
    if not Path(asked).exists():
        names = ", ".join(JINJA_TEMPLATES)
        raise UserError(f"no chat template: {asked}: use one of {names}, or a file or folder")
    return read_chat_template(asked).source


def document_of_chat(chat: Chat, template: str | JinjaTemplate, loss: str) -> Document:
    """Applies a template, a name in `TEMPLATES` or a Jinja template, to a chat.

    With the loss "response", the messages with loss and the ends of answers have loss. With "all",
    every token has loss except answers without loss. The document may be cut at the ends of
    exchanges.

    Raises:
        DroppedError: The Jinja template rejected the chat, or the template does not have a role or
            a field of the chat.
    """
    if isinstance(template, JinjaTemplate):
        return template.document(chat, loss)
    write = TEMPLATES[template]
    system, exchanges = _exchanges(chat)
    segments: list[Segment] = []
    cut_points = []
    for number, (question, answer) in enumerate(exchanges):
        prompt, response = write(system if number == 0 else None, question, answer, number)
        if loss == "all":
            prompt = [replace(segment, loss=True) for segment in prompt]
        segments += [*prompt, *response]
        cut_points.append(len(segments))
    return Document(tuple(segments), tuple(cut_points))


def _exchanges(
    chat: Chat,
) -> tuple[ChatMessage | None, list[tuple[ChatMessage, ChatMessage]]]:
    """Returns the system message and the exchanges of a chat, which are all that it may have."""
    if chat.tools:
        raise DroppedError("tools")
    has_system = chat.messages[0].role == "system"
    messages = chat.messages[has_system:]
    for message in messages:
        if message.role == "system":
            raise DroppedError("system_turn_not_first")
        if message.role not in ("user", "assistant"):
            raise DroppedError(f"{message.role}_not_in_template")
        for name in message.fields:
            raise DroppedError(name)
    pairs = list(zip(messages[::2], messages[1::2], strict=False))
    if 2 * len(pairs) != len(messages) or any(
        (question.role, answer.role) != ("user", "assistant") for question, answer in pairs
    ):
        raise DroppedError("answer_without_question")
    return (chat.messages[0] if has_system else None), pairs

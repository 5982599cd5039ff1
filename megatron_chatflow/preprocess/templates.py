"""The built-in chat templates `chatflow`, `llama2` and `chatml`.

Each template exists twice: as a function that returns an exchange as segments, with loss only on
the answer, and as Jinja source that produces the same text in transformers.

`chatflow` is the format of the paper, with `### Instruction:` and `### Response:`. Every answer
ends with the tokenizer's end-of-sequence token. No template adds a token at the beginning of a
text.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.chat_template import Chat, JinjaTemplate, read_chat_template
from megatron_chatflow.tokenizer.documents import Document, Segment

Exchange = tuple[list[Segment], list[Segment]]  # prompt and answer of one exchange


def _text(text: str, loss: bool = False) -> Segment:
    return Segment(text, loss)


def _control(name: str, loss: bool = False) -> Segment:
    return Segment(name, loss, "control")


def _end() -> Segment:
    return Segment("", True, "end")


def _chatflow(chat: Chat, number: int) -> Exchange:
    question, answer = chat.exchanges[number]
    system = f"{chat.system.strip()}\n\n" if chat.system and number == 0 else ""
    prompt = f"{system}### Instruction:\n{question.strip()}\n\n### Response:\n"
    return [_text(prompt)], [_text((answer or "").strip(), True), _end()]


def _llama2(chat: Chat, number: int) -> Exchange:
    question, answer = chat.exchanges[number]
    system = f"<<SYS>>\n{chat.system.strip()}\n<</SYS>>\n\n" if chat.system and number == 0 else ""
    prompt = f"[INST] {system}{question.strip()} [/INST]"
    return [_text(prompt)], [_text(f" {(answer or '').strip()} ", True), _end()]


def _chatml(chat: Chat, number: int) -> Exchange:
    question, answer = chat.exchanges[number]
    prompt: list[Segment] = []
    if chat.system and number == 0:
        prompt += _chatml_message("system", chat.system)
    if number > 0:
        prompt.append(_text("\n"))
    prompt += _chatml_message("user", question)
    prompt += [_control("<|im_start|>"), _text("assistant\n")]
    return prompt, [_text(answer or "", True), _control("<|im_end|>", True), _end()]


def _chatml_message(role: str, content: str) -> list[Segment]:
    opening = [_control("<|im_start|>"), _text(f"{role}\n{content}")]
    return [*opening, _control("<|im_end|>"), _text("\n")]


TEMPLATES: dict[str, Callable[[Chat, int], Exchange]] = {
    "chatflow": _chatflow,
    "llama2": _llama2,
    "chatml": _chatml,
}

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
    """Applies a template, a name in `TEMPLATES` or the user's, to a chat with all answers.

    With the loss "response", the answers and their end tokens have loss, with "all" every token. In
    both cases, the chat's untrained answers have no loss. The document may be cut at the ends of
    exchanges.

    Raises:
        DroppedError: The user's template rejected the chat.
    """
    if isinstance(template, JinjaTemplate):
        return template.document(chat, loss)
    write = TEMPLATES[template]
    segments: list[Segment] = []
    cut_points = []
    for number in range(len(chat.exchanges)):
        prompt, answer = write(chat, number)
        if loss == "all":
            prompt = [replace(segment, loss=True) for segment in prompt]
        if number in chat.untrained_answers:
            answer = [replace(segment, loss=False) for segment in answer]
        segments += [*prompt, *answer]
        cut_points.append(len(segments))
    return Document(tuple(segments), tuple(cut_points))

"""Tests chats rendered by a Jinja template: exact loss spans, or a refusal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
from megatron_chatflow.tokenizer.chat_template import (
    Chat,
    ChatMessage,
    JinjaTemplate,
    chat_of_exchanges,
    find_chat_template,
    read_chat_template,
    template_variables,
)
from megatron_chatflow.tokenizer.documents import Document, DroppedError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}]"
    "{% endfor %}{{ messages | length }}"
)
FORGETS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[:3] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = chat_of_exchanges("Be brief.", (("one <|im_end|>?", "A <|im_end|> b."), ("two", "C.")))
TOKENS = ("<|im_start|>", "<|im_end|>", "</s>")


def template(source: str) -> JinjaTemplate:
    return JinjaTemplate("t.jinja", source, TOKENS, (("eos_token", "</s>"),))


def learnt(document: Document) -> list[tuple[str, str]]:
    return [(s.text, s.kind) for s in document.segments if s.loss]


def test_prefixes_say_where_answers_are() -> None:
    document = template(CHATML).document(CHAT, "response")
    assert "".join(segment.text for segment in document.segments) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none <|im_end|>?<|im_end|>\n"
        "<|im_start|>assistant\nA <|im_end|> b.<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nC.<|im_end|>\n"
    )
    end = ("<|im_end|>", "control")
    assert learnt(document) == [("A <|im_end|> b.", "text"), end, ("C.", "text"), end]
    # none of them from the content
    assert sum(s.text == "<|im_end|>" for s in document.segments) == 5
    first = "".join(s.text for s in document.segments[: document.cut_points[0]])
    assert first.endswith("b.<|im_end|>\n") and document.cut_points[1] == len(document.segments)
    assert all(s.loss for s in template(CHATML).document(CHAT, "all").segments)


def test_marks_say_where_answers_are() -> None:
    marked = template(MARKED)
    marked.check()
    document = marked.document(CHAT, "response")
    end = ("</s>", "control")
    assert learnt(document) == [("A <|im_end|> b.", "text"), end, ("C.", "text"), end]
    # the text ends with the number of messages, so it must not be cut
    assert document.cut_points == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FORGETS, "does not begin with the text of its first turns"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[-1].content }}", "first turns"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}x{% endgeneration %}",
         "it marks"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_on(source: str, message: str) -> None:
    with pytest.raises(UserError, match=f"cannot be trained on: t.jinja: .*{message}"):
        template(source).check()


def test_a_chat_that_the_template_refuses_is_dropped() -> None:
    source = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    template(source).check()
    with pytest.raises(DroppedError, match="template_refused"):
        template(source).document(chat_of_exchanges(None, (("no", "x"),)), "response")


def test_reads_a_models_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert read_chat_template(tmp_path).source == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert read_chat_template(tmp_path).source == CHATML
    # The path of the configuration stands for its folder, and transformers prefers its .jinja file.
    assert read_chat_template(tmp_path / "tokenizer_config.json").source == CHATML
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_chat_template(tmp_path / "tokenizer_config.json").source == CHATML
    (tmp_path / "bad.jinja").write_text("\n{% if %}")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no chat template: .*deep.json"):
        read_chat_template(tmp_path / "deep.json")
    for name, message in [("bad.jinja", "bad.jinja:2"), ("absent", "cannot read chat template")]:
        with pytest.raises(UserError, match=message):
            read_chat_template(tmp_path / name)


NAMED = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({"tokenizer_config.json": json.dumps({"chat_template": NAMED})}, "{{ 1 }}"),
        ({"tokenizer_config.json": json.dumps({"chat_template": None})}, None),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "{{ 3 }}"}, "{{ 3 }}"),
        ({"chat_template.json": json.dumps({"chat_template": "{{ 4 }}"})}, "{{ 4 }}"),
        ({"additional_chat_templates/default.jinja": "{{ 5 }}"}, "{{ 5 }}"),
        ({}, None),
    ],
)
def test_a_folders_own_template(
    files: dict[str, str], templates: str | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = find_chat_template(tmp_path)
    assert (found and found.source) == templates
    if found is None:
        with pytest.raises(UserError, match="no chat template"):
            read_chat_template(tmp_path)


def test_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": NAMED[1:]}))
    with pytest.raises(UserError, match="has only tool_use, and none is called default"):
        find_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("source", "token"),
    [
        (CHATML, "<|im_end|>"),
        (MARKED, "</s>"),
        (JINJA_TEMPLATES["chatflow"], "</s>"),
        (JINJA_TEMPLATES["llama2"], "</s>"),
        (JINJA_TEMPLATES["chatml"], "<|im_end|>"),  # takes precedence over the end of the sequence
        (FORGETS, None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_token_that_ends_a_turn(source: str, token: str | None) -> None:
    assert template(source).turn_end() == token
    without = JinjaTemplate("t.jinja", source, ("</s>",), (("eos_token", "</s>"),))
    assert without.turn_end() == (None if source in (CHATML, FORGETS) else token and "</s>")


def test_a_template_that_writes_the_date() -> None:
    chat = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    with pytest.raises(UserError, match=r"the current date \(strftime_now\).* a fixed date"):
        template("{{ strftime_now('%Y-%m-%d') }}" + chat).check()
    guarded = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}"
    template(guarded + chat + "{% if add_generation_prompt %}[assistant]{% endif %}").check()


ASKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
LAST_ONLY = (
    "{% for m in messages[1:] %}{% if m.role == 'user' %}<|im_start|>"
    "{{ messages[0].content if loop.last }}{{ m.content }}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_a_template_that_asks_after_the_last_answer() -> None:
    """The first template of LLaMA 3 ignores `add_generation_prompt`."""
    asks = template(ASKS)
    asks.check()
    document = asks.document(CHAT, "response")
    assert [text for text, _ in learnt(document)] == [
        "A <|im_end|> b.",
        "<|im_end|>",
        "C.",
        "<|im_end|>",
    ]
    assert "".join(s.text for s in document.segments).endswith("C.<|im_end|>")


def test_a_system_text_that_only_the_prompt_has() -> None:
    """Mistral's template writes it into a last question, which a chat with an answer has not."""
    with pytest.raises(DroppedError, match="system_not_in_template"):
        template(LAST_ONLY).document(CHAT, "response")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"messages": 1}', "messages is given by the chat"),
        ('{"a": []}', "a is no text"),
    ],
)
def test_variables_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--chat-template-kwargs .*{message}"):
        template_variables(text)


def test_variables_and_reasoning() -> None:
    source = CHATML.replace("{{ m.content | trim }}", "{{ m.thinking }}{{ style }}{{ m.content }}")
    answer = ChatMessage("assistant", "a", True, {"thinking": "hm "})
    chat = Chat((ChatMessage("user", "q"), answer))
    given = replace(template(source), variables=template_variables('{"style": "<b>"}'))
    assert learnt(given.document(chat, "response"))[0] == ("hm <b>a", "text")
    with pytest.raises(DroppedError, match="thinking"):
        template(CHATML.replace("| trim", "| trim ~ ' thinking '")).document(chat, "response")

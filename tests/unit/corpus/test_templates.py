"""Chat templates: prompts, what is learnt, and agreement with their Jinja sources."""

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.templates import (
    JINJA_TEMPLATES,
    TEMPLATES,
    document_of_chat,
    prompt_segments,
    render_prompt,
)
from megatron_chatflow.tokenizer.chat_template import Chat
from megatron_chatflow.tokenizer.documents import Segment

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Name a fruit.\n"},
    {"role": "assistant", "content": "A pear."},
    {"role": "user", "content": "Another?"},
]


def test_chatflow_is_the_papers_prompt() -> None:
    assert render_prompt(MESSAGES[1:2], "chatflow") == (
        "### Instruction:\nName a fruit.\n\n### Response:\n"
    )
    assert render_prompt(MESSAGES, "chatflow") == (
        "Be brief.\n\n### Instruction:\nName a fruit.\n\n### Response:\nA pear.</s>"
        "### Instruction:\nAnother?\n\n### Response:\n"
    )


def test_llama2_is_metas_prompt() -> None:
    assert render_prompt(MESSAGES, "llama2") == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a fruit. [/INST] A pear. </s>"
        "[INST] Another? [/INST]"
    )


def test_chatml() -> None:
    expected = (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nName a fruit.\n<|im_end|>\n"
        "<|im_start|>assistant\nA pear.<|im_end|>{eos}\n<|im_start|>user\nAnother?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render_prompt(MESSAGES, "chatml") == expected.format(eos="</s>")
    assert render_prompt(MESSAGES, "chatml", "<|im_end|>") == expected.format(eos="")


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_and_their_ends_are_learnt(template: str) -> None:
    chat = Chat("Be brief.", (("one", "ANSWER one"), ("two", "ANSWER two")))
    document = document_of_chat(chat, template, "response")
    learnt = [segment for segment in document.segments if segment.loss]
    texts = [segment.text.strip() for segment in learnt if segment.kind == "text"]
    assert texts == ["ANSWER one", "ANSWER two"]
    assert sum(segment.kind == "end" for segment in learnt) == 2
    assert not any("ANSWER" in segment.text for segment in document.segments if not segment.loss)
    assert [document.segments[cut - 1].kind for cut in document.cut_points] == ["end", "end"]
    assert document.cut_points[-1] == len(document.segments)
    everything = document_of_chat(chat, template, "all")
    assert [s.text for s in everything.segments] == [s.text for s in document.segments]
    assert all(segment.loss for segment in everything.segments)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_the_beginning_of_its_document(template: str) -> None:
    chat = Chat("Be brief.", (("one", "ANSWER one"), ("two", "ANSWER two")))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ANSWER one"},
        {"role": "user", "content": "two"},
    ]
    segments = prompt_segments(messages, template)
    document = document_of_chat(chat, template, "response")
    assert document.segments[: len(segments)] == segments
    assert "ANSWER two" in document.segments[len(segments)].text
    assert Segment("", True, "end") in segments


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("eos_token", ["</s>", "<|im_end|>"])
def test_jinja_renders_the_same_text(template: str, eos_token: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    source = environment.from_string(JINJA_TEMPLATES[template])
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[:2], MESSAGES[1:2]):
        rendered = source.render(messages=messages, eos_token=eos_token, add_generation_prompt=True)
        assert rendered == render_prompt(messages, template, eos_token)


@pytest.mark.parametrize(
    "messages",
    [[], MESSAGES[:3], MESSAGES[2:], [{"content": "x"}], [{"role": "user", "content": " "}]],
)
def test_refuses_what_is_no_chat(messages: list[dict[str, str]]) -> None:
    with pytest.raises(UserError, match="not a chat"):
        render_prompt(messages, "chatflow")


def test_refuses_an_unknown_template() -> None:
    with pytest.raises(UserError, match="unknown chat template: alpaca: choose one of chatflow"):
        render_prompt(MESSAGES, "alpaca")

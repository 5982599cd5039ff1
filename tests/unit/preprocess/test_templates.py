"""Tests chat templates: prompts, loss spans, and agreement with their Jinja sources."""

import pytest
from prompts import prompt_text

from megatron_chatflow.preprocess.templates import (
    JINJA_TEMPLATES,
    TEMPLATES,
    document_of_chat,
)
from megatron_chatflow.tokenizer.chat_template import chat_of_exchanges

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Name a fruit.\n"},
    {"role": "assistant", "content": "A pear."},
    {"role": "user", "content": "Another?"},
]


def test_chatflow_is_the_papers_prompt() -> None:
    assert prompt_text(MESSAGES[1:2], "chatflow") == (
        "### Instruction:\nName a fruit.\n\n### Response:\n"
    )
    assert prompt_text(MESSAGES, "chatflow") == (
        "Be brief.\n\n### Instruction:\nName a fruit.\n\n### Response:\nA pear.</s>"
        "### Instruction:\nAnother?\n\n### Response:\n"
    )


def test_llama2_is_metas_prompt() -> None:
    assert prompt_text(MESSAGES, "llama2") == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a fruit. [/INST] A pear. </s>"
        "[INST] Another? [/INST]"
    )


def test_chatml() -> None:
    expected = (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nName a fruit.\n<|im_end|>\n"
        "<|im_start|>assistant\nA pear.<|im_end|>{eos}\n<|im_start|>user\nAnother?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt_text(MESSAGES, "chatml") == expected.format(eos="</s>")
    assert prompt_text(MESSAGES, "chatml", "<|im_end|>") == expected.format(eos="")


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_and_their_ends_have_loss(template: str) -> None:
    chat = chat_of_exchanges("Be brief.", (("one", "ANSWER one"), ("two", "ANSWER two")))
    document = document_of_chat(chat, template, "response")
    with_loss = [segment for segment in document.segments if segment.loss]
    texts = [segment.text.strip() for segment in with_loss if segment.kind == "text"]
    assert texts == ["ANSWER one", "ANSWER two"]
    assert sum(segment.kind == "end" for segment in with_loss) == 2
    assert not any("ANSWER" in segment.text for segment in document.segments if not segment.loss)
    assert [document.segments[cut - 1].kind for cut in document.cut_points] == ["end", "end"]
    assert document.cut_points[-1] == len(document.segments)
    everything = document_of_chat(chat, template, "all")
    assert [s.text for s in everything.segments] == [s.text for s in document.segments]
    assert all(segment.loss for segment in everything.segments)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("eos_token", ["</s>", "<|im_end|>"])
def test_jinja_renders_the_same_text(template: str, eos_token: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    source = environment.from_string(JINJA_TEMPLATES[template])
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[:2], MESSAGES[1:2]):
        rendered = source.render(messages=messages, eos_token=eos_token, add_generation_prompt=True)
        assert rendered == prompt_text(messages, template, eos_token)

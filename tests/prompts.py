"""Prompts in the built-in chat templates, cut from documents that include the answer."""

from collections.abc import Mapping, Sequence

from megatron_chatflow.preprocess.chats import Turn, chat_of_turns
from megatron_chatflow.preprocess.templates import document_of_chat
from megatron_chatflow.tokenizer.documents import Segment

ANSWER = "ANSWER to the prompt"


def prompt_segments(messages: Sequence[Mapping[str, str]], template: str) -> tuple[Segment, ...]:
    """Returns the segments of a chat that precede the answer to its last message."""
    turns = [Turn(message["role"], message["content"]) for message in messages]
    chat = chat_of_turns([*turns, Turn("assistant", ANSWER)])
    segments = document_of_chat(chat, template, "response").segments
    (number,) = [k for k, segment in enumerate(segments) if ANSWER in segment.text]
    return segments[:number]


def prompt_text(
    messages: Sequence[Mapping[str, str]], template: str, eos_token: str = "</s>"
) -> str:
    """Returns the same as text, with ``eos_token`` after each earlier answer."""
    texts: list[str] = []
    for segment in prompt_segments(messages, template):
        if segment.kind != "end":
            texts.append(segment.text)
        elif texts[-1:] != [eos_token]:  # In chatml a turn may already end with this token.
            texts.append(eos_token)
    return "".join(texts)

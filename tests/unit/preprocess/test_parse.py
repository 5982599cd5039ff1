"""Tests parsing: which records are kept, dropped (with the reason that is counted) or repaired."""

from typing import Any

import pytest

from megatron_chatflow.preprocess.chats import chat_of
from megatron_chatflow.preprocess.pairs import PairSettings, documents_of_pair
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import Chunk
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.preprocess.tab_separated import TabLayout
from megatron_chatflow.preprocess.templates import document_of_chat
from megatron_chatflow.tokenizer.chat_template import (
    Chat,
    ChatMessage,
    JinjaTemplate,
    chat_of_exchanges,
)
from megatron_chatflow.tokenizer.documents import BadLineError, Document, DroppedError, ParsedChunk


def parse(data: bytes, **options: Any) -> ParsedChunk:
    return parse_chunk(Chunk("f.jsonl", 11, "lines", data, 0), CorpusSettings(**options))


def test_text_of_several_keys() -> None:
    data = b'{"text": "one", "title": "A", "n": 1}\n\n  \r\n{"title": "", "text": "two"}\r\n'
    result = parse(data, json_keys=("text", "title"))
    assert result.documents == {"text": ["one", "two"], "title": ["A", ""]}
    assert (result.num_bad, result.num_dropped, result.num_repaired) == (0, {}, {})


def test_bad_lines_are_counted_by_reason_and_the_first_is_named() -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "\xff\xfe"}',
        b'{"text": }',
        b'{"text": 5}',
        b'{"content": "x"}',
        b'["text"]',
        b'{"text": "cut off',
        b"[" * 5000,
        b'{"text": "good"}',
    ]
    result = parse(b"\n".join(lines))
    assert result.documents["text"] == ["good", "good"]
    assert result.num_dropped == {
        "not_utf8": 1,
        "malformed_json": 3,
        "not_text_text": 1,
        "no_key_text": 1,
        "not_an_object": 1,
    }
    assert (result.num_bad, result.first_bad) == (7, "f.jsonl:12: not_utf8")


def test_invalid_utf8_replaced_when_asked_for() -> None:
    result = parse(b'{"text": "a\xffb\xe4\xb8"}\n{"text": }', invalid_utf8="replace")
    assert result.documents["text"] == ["a\ufffdb\ufffd"]
    assert (result.num_repaired, result.num_bad) == ({"invalid_utf8": 1}, 1)


def test_half_a_surrogate_pair_is_mended() -> None:
    result = parse(b'{"text": "a\\ud800b \\ud83e\\uddff"}\n{"text": "c", "score": NaN}')
    assert result.documents["text"] == ["a\ufffdb \U0001f9ff", "c"]
    assert (result.num_repaired, result.num_bad) == ({"lone_surrogate": 1}, 0)


def test_txt() -> None:
    chunk = Chunk("a.txt", 1, "text", b"one\r\n\xfftwo", 0)
    result = parse_chunk(chunk, CorpusSettings())
    assert result.documents["text"] == ["one\r\n\ufffdtwo"]
    assert result.num_repaired == {"invalid_utf8": 1}
    chunk = Chunk("a.txt", 1, "text_lines", b"one\r\n\n two \n", 0)
    assert parse_chunk(chunk, CorpusSettings()).documents["text"] == ["one", " two "]


def spans(document: Document | str) -> list[tuple[str, bool]]:
    assert isinstance(document, Document)
    return [(segment.text, segment.loss) for segment in document.segments]


def test_pairs_of_lines() -> None:
    data = (
        b"one\t\xe4\xb8\x80\n"
        b"{0} files\t{0} \xe6\x96\x87\xe4\xbb\xb6\n"
        b"no tab here\n"
        b"five\t\n"
        b"six\tsix\n"
        b"seven\t\xe4\xb8\x83\thttp://a.b\n"
        b'"say ""hi"""\t"\xe8\xaf\xb4"\r\n'
    )
    chunk = Chunk("f.tsv", 11, "lines", data, 0, TabLayout((0, 1), 2))
    settings = PairSettings(direction="forward")
    result = parse_chunk(chunk, CorpusSettings(format="pairs", pairs=settings))
    texts = [spans(document) for document in result.documents["text"]]
    assert texts == [
        [("one\n\u4e00", True)],
        [("{0} files\n{0} \u6587\u4ef6", True)],
        [('say "hi"\n"\u8bf4"', True)],
    ]
    assert result.num_dropped == {
        "no_tab": 1,
        "wrong_number_of_columns": 1,
        "empty_side": 1,
        "identical_sides": 1,
    }
    assert result.num_repaired == {"csv_quotes": 1}
    assert (result.num_bad, result.first_bad) == (2, "f.tsv:13: no_tab")


def test_pairs_of_objects() -> None:
    data = (
        b'{"en": "two", "zh": "\xe4\xba\x8c"}\n'
        b'{"translation": {"en": "three", "zh": "\xe4\xb8\x89"}}\n'
        b'{"en": "four"}\n'
        b'{"en": "five", "zh": ""}\n'
    )
    result = parse(data, format="pairs", pairs=PairSettings(direction="forward"))
    texts = [spans(document) for document in result.documents["text"]]
    assert texts == [[("two\n\u4e8c", True)], [("three\n\u4e09", True)]]
    assert result.num_dropped == {"no_key_zh": 1, "empty_side": 1}
    assert (result.num_bad, result.first_bad) == (1, "f.jsonl:13: no_key_zh (has en)")


def test_translation_has_loss_on_the_target_alone() -> None:
    settings = PairSettings(template="translate", direction="both")
    pair = ("A cat.", "\u732b\u3002")
    forward, backward = documents_of_pair(*pair, settings, "chatflow", "response")
    assert spans(forward) == [
        (
            "### Instruction:\nTranslate the following text into Chinese.\n\nA cat.\n\n"
            "### Response:\n",
            False,
        ),
        ("\u732b\u3002", True),
        ("", True),
    ]
    assert spans(backward)[1] == ("A cat.", True)
    assert "into English.\n\n\u732b\u3002" in spans(backward)[0][0]
    (whole, _) = documents_of_pair(*pair, settings, "chatflow", "all")
    assert all(loss for _, loss in spans(whole))


def test_direction_by_hash_is_about_even_and_fixed() -> None:
    settings = PairSettings(direction="hash")
    first_sides = []
    for k in range(400):
        pair = (f"sentence {k}", f"\u53e5 {k}")
        (document,) = documents_of_pair(*pair, settings, "chatflow", "all")
        assert documents_of_pair(*pair, settings, "chatflow", "all") == [document]
        first_sides.append(spans(document)[0][0].startswith("sentence"))
    assert 160 < sum(first_sides) < 240


def test_length_ratio_is_in_bytes() -> None:
    settings = PairSettings(max_length_ratio=3.0)
    assert documents_of_pair("abcdefghi", "\u732b", settings, "chatflow", "all")
    with pytest.raises(DroppedError, match="length_ratio"):
        documents_of_pair("abcdefghij", "\u732b", settings, "chatflow", "all")
    unlimited = PairSettings(max_length_ratio=0)
    assert documents_of_pair("a" * 1000, "\u732b", unlimited, "chatflow", "all")


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Good bye"},
                {"role": "user", "content": "still there?"},
            ]
        },
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Bye"},
                {"from": "gpt", "value": "Good bye"},
            ],
        },
        {
            "instruction": "Bye",
            "input": "",
            "output": "Good bye",
            "history": [["Hi", "Hello"]],
            "system": "Be brief.",
        },
    ],
)
def test_the_same_chat_in_three_formats(record: dict[str, Any]) -> None:
    assert chat_of(record, "messages") == chat_of_exchanges(
        "Be brief.", (("Hi", "Hello"), ("Bye", "Good bye"))
    )


def test_alpaca_input_follows_the_instruction() -> None:
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    chat = chat_of(record, "messages")
    assert chat == chat_of_exchanges(None, (("Add.\n\n1 and 2", "3"),))


def test_a_key_of_its_own() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = chat_of({"dialogue": turns, "messages": 3}, "dialogue")
    assert chat == chat_of_exchanges(None, (("a", "b"),))


def message(role: str, content: Any = "x", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


QUESTION = message("user")


@pytest.mark.parametrize("field", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_answers_without_loss(field: str, value: object) -> None:
    turns = [QUESTION, message("assistant", "A", **{field: value}), QUESTION]
    turns += [message("assistant", "B", **{field: True}), {"from": "human", "value": "x"}]
    turns += [{"from": "gpt", "value": "C", field: None}]
    chat = chat_of({"messages": turns}, "messages")
    assert [(answer.text, answer.loss) for answer in chat.answers] == [
        ("A", False),
        ("B", True),
        ("C", True),
    ]


@pytest.mark.parametrize("template", ["chatflow", "llama2", "chatml", "jinja", "marked"])
@pytest.mark.parametrize("loss", ["response", "all"])
def test_answers_without_loss_are_not_learnt(template: str, loss: str) -> None:
    answer = "{{ message['content'] }}</s>"
    source = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}ANSWER"
        "{% else %}[{{ message['content'] }}]{% endif %}{% endfor %}"
    )
    marked = "{% generation %}" + answer + "{% endgeneration %}"
    sources = {
        "jinja": source.replace("ANSWER", answer),
        "marked": source.replace("ANSWER", marked),
    }
    own = JinjaTemplate("f", sources[template], ("</s>",)) if template in sources else None
    exchanges = (("one", "ANSWER 1"), ("two", "ANSWER 2"), ("three", "ANSWER 3"))
    messages = list(chat_of_exchanges(None, exchanges).messages)
    messages[3] = ChatMessage("assistant", "ANSWER 2", loss=False)
    chat = Chat(tuple(messages))
    segments = document_of_chat(chat, own or template, loss).segments
    learnt = "".join(segment.text for segment in segments if segment.loss)
    untrained = "".join(segment.text for segment in segments if not segment.loss)
    assert "ANSWER 1" in learnt and "ANSWER 3" in learnt and "ANSWER 2" in untrained
    assert ("two" in learnt) == (loss == "all")
    ends = [s.loss for s in segments if s.kind == "end" or s.text == "</s>"]
    assert ends == [True, False, True]


@pytest.mark.parametrize(
    "record",
    [
        {"system": "S", "messages": [message("system", "S"), QUESTION, message("assistant")]},
        {"system": None, "messages": [message("system", "S"), QUESTION, message("assistant")]},
        {"messages": None, "conversations": None, "system": "S", "instruction": "x", "output": "x"},
        {
            "system": "S",
            "messages": None,
            "tools": "[]",
            "images": [],
            "conversations": [
                {"from": "human", "value": "x", "role": None, "content": None, "tool_calls": None},
                {"from": "gpt", "value": "x", "role": None, "weight": 1, "reasoning_content": ""},
            ],
        },
        {"system": "S", "instruction": "x", "context": "", "response": "x"},
        {"system": "S", "instruction": "", "input": "x", "context": "x", "output": "x"},
    ],
)
def test_null_and_equal_fields_count_as_absent(record: dict[str, Any]) -> None:
    assert chat_of(record, "messages") == chat_of_exchanges("S", (("x", "x"),))


def test_dolly() -> None:
    record = {"instruction": "Who?", "context": "Bana is.", "response": "Bana.", "category": "qa"}
    chat = chat_of(record, "messages")
    assert chat == chat_of_exchanges(None, (("Who?\n\nBana is.", "Bana."),))


@pytest.mark.parametrize(
    ("record", "reason", "is_bad"),
    [
        ({"text": "a"}, "no_chat_key", True),
        ({"messages": "a"}, "messages_not_a_list", True),
        ({"messages": ["a"]}, "message_not_an_object", True),
        ({"instruction": "a", "output": 5}, "field_not_text", True),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history_not_pairs", True),
        ({"messages": []}, "no_answer", False),
        ({"messages": [message("user")]}, "no_answer", False),
        ({"messages": [message("user"), message("narrator")]}, "unknown_role", False),
        ({"messages": [message("user", [{"type": "image"}])]}, "content_not_text", False),
        ({"messages": [message("user"), message("assistant", None)]}, "content_not_text", False),
        ({"messages": [message("user"), message("assistant", " ")]}, "empty_answer", False),
        ({"messages": [message("user", ""), message("assistant")]}, "empty_question", False),
        ({"messages": [message("user"), message("user")]}, "two_user_turns", False),
        ({"messages": [message("assistant")]}, "answer_without_question", False),
        ({"instruction": "a", "output": ""}, "empty_answer", False),
        ({"instruction": "a", "output": 0}, "field_not_text", True),
        ({"instruction": "a", "input": [], "output": "b"}, "field_not_text", True),
        ({"system": ["a"], "messages": [QUESTION, message("assistant")]}, "field_not_text", True),
        (
            {"instruction": "a", "input": "b", "context": "c", "output": "d"},
            "input_and_context",
            False,
        ),
        ({"instruction": "a", "output": "b", "response": "c"}, "output_and_response", False),
        (
            {"system": "a", "messages": [message("system", "b"), QUESTION, message("assistant")]},
            "system_field_and_system_turn",
            False,
        ),
        ({"messages": [QUESTION, message("assistant", weight=0)]}, "no_answer_with_loss", False),
        (
            {"messages": [QUESTION, message("assistant", weight=0.5)]},
            "weight_neither_0_nor_1",
            False,
        ),
        ({"messages": [QUESTION, message("assistant", loss="no")]}, "loss_neither_0_nor_1", False),
        ({"messages": [message("user", train=True)]}, "no_answer", False),
        (
            {"messages": [QUESTION, message("assistant", weight=0, train=True)]},
            "contradicting_loss_fields",
            False,
        ),
        (
            {"messages": [QUESTION, message("assistant", None, tool_calls=[{}])]},
            "tool_calls_not_objects",
            False,
        ),
        (
            {"messages": [message("user", reasoning_content="so"), message("assistant")]},
            "reasoning_content_on_user_turn",
            False,
        ),
        ({"instruction": "a", "output": "b", "images": ["c.png"]}, "images", False),
    ],
)
def test_chats_left_out(record: dict[str, Any], reason: str, is_bad: bool) -> None:
    with pytest.raises(DroppedError) as caught:
        chat_of(record, "messages")
    assert caught.value.reason == reason
    assert isinstance(caught.value, BadLineError) == is_bad


def test_chats_of_lines() -> None:
    data = b'{"instruction": "a", "output": "b"}\n{"text": "c"}\n{"messages": []}\n'
    result = parse(data, format="chat", json_keys=("messages",))
    assert len(result.documents["messages"]) == 1
    assert result.num_dropped == {"no_chat_key": 1, "no_answer": 1}
    assert (result.num_bad, result.first_bad) == (1, "f.jsonl:12: no_chat_key (has text)")

"""Tests chats as people store them: keys, roles, consecutive turns, and messages with loss."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from preprocess_jobs import Jobs
from tool_calls import call_tool

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.chats import ChatSettings, chat_of, parse_chat_key
from megatron_chatflow.preprocess.job import preprocess
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import find_inputs, read_chunks
from megatron_chatflow.preprocess.settings import CorpusSettings, settings_of_options
from megatron_chatflow.preprocess.templates import document_of_chat
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.chat_template import Chat, JinjaTemplate, chat_of_exchanges
from megatron_chatflow.tokenizer.documents import BadLineError, Document, DroppedError

# A ChatML template as of current models: any role at any place, and calls of tools.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Knows users and assistants only, and silently leaves out all others.
SKIPS = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
SIMPLE = chat_of_exchanges(None, (("Hi", "Hello"),))


def jinja(source: str) -> JinjaTemplate:
    return JinjaTemplate("t.jinja", source, ("<|im_start|>", "<|im_end|>", "</s>"))


def message(role: str, content: Any = "x", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def chat(record: Any, **settings: Any) -> Chat:
    return chat_of(record, "messages", ChatSettings(**settings))


def learnt(document: Document) -> str:
    return "|".join(segment.text for segment in document.segments if segment.loss)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "response": "Hello", "completion": None},
        {"question": "Hi", "answer": "Hello"},
        {"query": "Hi", "response": "Hello"},
        {"input": "Hi", "output": "Hello"},
        {"input": "Hi", "target": "Hello", "kind": "chat"},
        {"inputs": "Hi", "targets": "Hello"},
        {"instruction": "Hi", "context": "", "response": "Hello", "category": "chat"},
        {"prompt": [message("user", "Hi")], "completion": [message("assistant", "Hello")]},
        {"messages": json.dumps([message("user", "Hi"), message("assistant", "Hello")])},
        [message("user", "Hi"), message("assistant", "Hello")],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        ["Hi", "Hello"],
        [["Hi", "Hello"]],
        [["user", "Hi"], ["assistant", "Hello"]],
        {"messages": [["Human", "Hi"], ["gpt", "Hello"]]},
    ],
)
def test_usual_records(record: Any) -> None:
    assert chat(record) == SIMPLE


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        ({"q": "Hi", "reply": "Hello", "messages": "no"}, "prompt=q answer=reply"),
        ({"q": "Hi", "answer": "Hello"}, "prompt=q"),
        ({"dialogue": ["Hi", "Hello"], "messages": [], "question": "?"}, "messages=dialogue"),
        (
            {"messages": [{"who": "user", "says": "Hi"}, {"who": "bot", "says": "Hello"}]},
            "role=who content=says",
        ),
        (
            [{"who": "user", "says": "Hi"}, {"who": "bot", "says": "Hello"}],
            "role=who content=says",
        ),
    ],
)
def test_keys_of_the_user(record: Any, keys: str) -> None:
    given = tuple(map(parse_chat_key, keys.split()))
    ChatSettings(given).check()
    assert chat(record, keys=given) == SIMPLE


def test_system_context_and_history_beside_a_question() -> None:
    record = {
        "system_prompt": "S",
        "question": "Why?",
        "context": "It is.",
        "history": [["Hi", "Hello"]],
        "response": "So.",
    }
    expected = chat_of_exchanges("S", (("Hi", "Hello"), ("Why?\n\nIt is.", "So.")))
    assert chat(record) == expected
    keys = (("prompt", "q"), ("context", "c"), ("answer", "a"), ("system", "s"), ("history", "h"))
    record = {"s": "S", "q": "Why?", "c": "It is.", "h": [["Hi", "Hello"]], "a": "So."}
    assert chat(record, keys=keys) == expected


def test_roles_of_pairs() -> None:
    pairs = [["user", "Hi"], ["assistant", "Hello"]]
    expected = chat_of_exchanges(None, (("Hi", "Hello"), ("Why?", "So.")))
    assert chat({"history": pairs, "prompt": "Why?", "completion": "So."}) == expected
    assert chat([["system", "S"], *pairs]) == chat_of_exchanges("S", (("Hi", "Hello"),))
    # Not every first text is a role, so they are questions and answers.
    questions = [["user", "A person."], ["Who?", "You."]]
    assert chat(questions) == chat_of_exchanges(None, (("user", "A person."), ("Who?", "You.")))
    with pytest.raises(DroppedError, match="no_answer"):
        chat([["user", "Hi"]])
    call = ["function_call", '{"name": "add", "arguments": {}}']
    assert chat([*pairs[:1], call]).messages[1].fields["tool_calls"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [message("user", "Hi"), message("assistant", "Hello")]},
        {"conversations": [["Hi", "Hello"]]},
        {"instruction": "Hi", "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
    ],
)
def test_the_system_prompt_has_two_names(record: dict[str, Any]) -> None:
    expected = chat_of_exchanges("S", (("Hi", "Hello"),))
    for name in ("system", "system_prompt"):
        assert chat({**record, name: "S"}) == expected
    assert chat({**record, "system": None, "system_prompt": "S"}) == expected
    with pytest.raises(DroppedError, match="^system_and_system_prompt$"):
        chat({**record, "system": "S", "system_prompt": "T"})
    keys = (("system", "rule"),)
    assert chat({**record, "rule": "S", "system_prompt": "T"}, keys=keys) == expected


@pytest.mark.parametrize(
    ("record", "reason", "is_bad"),
    [
        ({"question": "a", "completion": "b"}, "no_chat_key", True),
        ({"question": "a", "answer": None}, "empty_answer", False),
        ({"question": "a", "answer": "b", "response": "c"}, "several_questions_or_answers", False),
        ({"input": "a", "output": "b", "question": "c", "answer": "d"},
         "several_questions_or_answers", False),
        ({"prompt": "a", "completion": "b", "history": ["c"]}, "history_not_pairs", True),
        ({"messages": "[not JSON"}, "messages_not_a_list", True),
        ([], "no_answer", False),
        ([message("user"), message("assistant", tool_calls="no")], "tool_calls_not_objects", False),
        ([message("user", tool_calls=[{}]), message("assistant")],
         "tool_calls_on_user_turn", False),
        ({"messages": ["a", "b"], "tools": "x"}, "tools_not_a_list", False),
        ([message("tool"), message("user"), message("assistant")], "answer_without_question",
         False),
    ],
)  # fmt: skip
def test_records_left_out(record: Any, reason: str, is_bad: bool) -> None:
    with pytest.raises(DroppedError) as caught:
        chat(record)
    assert caught.value.reason == reason
    assert isinstance(caught.value, BadLineError) == is_bad


def test_a_key_of_the_user_that_is_missing_is_a_bad_line() -> None:
    for keys in [(("prompt", "q"),), (("messages", "q"),), (("answer", "q"),)]:
        with pytest.raises(BadLineError) as caught:
            chat({"prompt": "a", "answer": "b", "messages": ["a", "b"]}, keys=keys)
        assert caught.value.detail == "no_key_q (has answer, messages, prompt)"


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("user user assistant", "two_user_turns"),
        ("user assistant assistant", "two_assistant_turns"),
        ("system system user assistant", "two_system_turns"),
    ],
)
def test_consecutive_turns(roles: str, reason: str) -> None:
    turns = [message(role, f"{role} {k}") for k, role in enumerate(roles.split())]
    with pytest.raises(DroppedError, match=reason):
        chat(turns)
    merged = chat(turns, consecutive="merge").messages
    assert [m.role for m in merged] == list(dict.fromkeys(roles.split()))
    assert "\n\n".join(m.text for m in merged) == "\n\n".join(turn["content"] for turn in turns)


def test_turns_that_differ_in_loss_are_not_merged() -> None:
    turns = [message("user"), message("assistant", "a", weight=0), message("assistant", "b")]
    with pytest.raises(DroppedError, match="merged_turns_differ_in_loss"):
        chat(turns, consecutive="merge")


LONG = [
    message("system", "S1"),
    message("user", "U1"),
    message("assistant", "A1"),
    message("system", "S2"),
    message("user", "U2"),
    message("assistant", "A2"),
    message("user", "U3"),
]


def test_system_turns_anywhere_if_the_template_has_them() -> None:
    document = document_of_chat(chat(LONG), jinja(TOOLS), "response")
    assert "".join(s.text for s in document.segments) == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in LONG[:-1]
    )
    assert learnt(document) == "A1|<|im_end|>|A2|<|im_end|>"
    for name in ("chatflow", "llama2", "chatml"):
        with pytest.raises(DroppedError, match="system_turn_not_first"):
            document_of_chat(chat(LONG), name, "response")
    with pytest.raises(DroppedError, match="system_not_in_template"):
        document_of_chat(chat(LONG), jinja(SKIPS), "response")
    refuses = "{% if loop.index > 1 and m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    source = TOOLS.replace("<|im_start|>{{ m", refuses + "<|im_start|>{{ m")
    assert document_of_chat(chat(LONG[:3]), jinja(source), "response")
    with pytest.raises(DroppedError, match="template_refused"):
        document_of_chat(chat(LONG), jinja(source), "response")


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
WITH_TOOLS = {
    "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
    "messages": [
        message("user", "Add."),
        message("assistant", None, tool_calls=[CALL]),
        message("tool", "2", tool_call_id="1"),
        message("tool", "3", tool_call_id="2"),
        message("assistant", "Two <|im_end|>."),
    ],
}
SHAREGPT = {
    "tools": WITH_TOOLS["tools"],
    "conversations": [
        {"from": "human", "value": "Add."},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Two <|im_end|>."},
    ],
}


@pytest.mark.parametrize("record", [WITH_TOOLS, SHAREGPT])
def test_tools_if_the_template_has_them(record: dict[str, Any]) -> None:
    document = document_of_chat(chat(record), jinja(TOOLS), "response")
    call = '<call>{"name": "add", "arguments": {"a": 1}}</call>'
    assert learnt(document) == f"{call}|<|im_end|>|Two <|im_end|>.|<|im_end|>"
    text = "".join(s.text for s in document.segments)
    assert text.startswith('<|im_start|>system\n[{"type": "function"')
    assert "tool\n2<|im_end|>\n<|im_start|>tool\n3<|im_end|>" in text
    # The name of a control token inside a text is not one.
    assert sum(s.kind == "control" for s in document.segments) == 12
    # A call is not cut off from its results.
    assert document.cut_points == (len(document.segments),)


def test_tools_that_the_template_does_not_have() -> None:
    without_calls = TOOLS.replace("tool_calls", "calls")
    cases: list[tuple[str | JinjaTemplate, Any, str]] = [
        ("chatml", WITH_TOOLS, "tools"),
        (jinja(SKIPS), WITH_TOOLS, "tools"),
        ("chatml", WITH_TOOLS["messages"], "tool_calls"),
        (jinja(without_calls), WITH_TOOLS["messages"], "tool_calls"),
    ]
    roles = ("user", "assistant", "tool", "assistant")
    cases += [
        (template, [message(role) for role in roles], "tool_not_in_template")
        for template in ("llama2", jinja(SKIPS))
    ]
    roles = ("user", "assistant", "function", "assistant")
    cases.append(("chatflow", [message(role) for role in roles], "function_not_in_template"))
    for template, record, reason in cases:
        with pytest.raises(DroppedError, match=f"^{reason}$"):
            document_of_chat(chat(record), template, "response")


TURNS = [
    message("system", "S"),
    message("user", "U1"),
    message("assistant", "A1"),
    message("user", "U2"),
    message("assistant", "A2"),
]


@pytest.mark.parametrize(
    ("train_on", "template", "expected"),
    [
        (("all",), "chatflow", "A1||A2|"),
        (("last",), "chatflow", "A2|"),
        (("user",), "chatflow", "U1|U2"),
        (("system", "assistant"), "llama2", "S| A1 || A2 |"),
        (("user", "assistant"), "chatml",
         "U1|<|im_end|>|A1|<|im_end|>||U2|<|im_end|>|A2|<|im_end|>|"),
        (("last",), "jinja", "A2|<|im_end|>"),
        (("user",), "jinja", "U1|<|im_end|>|U2|<|im_end|>"),
        (("system", "assistant"), "jinja", "S|<|im_end|>|A1|<|im_end|>|A2|<|im_end|>"),
        (("user", "assistant"), "marked", "U1|<|im_end|>|A1|U2|<|im_end|>|A2"),
        (("last",), "marked", "A2"),
    ],
)  # fmt: skip
def test_train_on(train_on: tuple[str, ...], template: str, expected: str) -> None:
    ChatSettings(train_on=train_on).check()
    marked = TOOLS.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}",
    )
    sources = {"jinja": TOOLS, "marked": marked}
    given = jinja(sources[template]) if template in sources else template
    document = document_of_chat(chat(TURNS, train_on=train_on), given, "response")
    assert learnt(document) == expected
    everything = document_of_chat(chat(TURNS), given, "response")
    texts = ["".join(s.text for s in d.segments) for d in (document, everything)]
    assert texts[0] == texts[1]


def test_fields_of_messages_take_precedence() -> None:
    turns = [
        message("user", "U1", train=True),
        message("assistant", "A1", weight=1),
        message("user", "U2", weight=1),
        message("assistant", "A2", train=True),
        message("user", "U3"),
        message("assistant", "A3", loss=False),
        message("user", "U4"),
        message("assistant", "A4"),
    ]
    for train_on, expected in [
        (("all",), "U1|A1||A2||A4|"),
        (("last",), "U1|A2||A4|"),  # a weight of 1 is the default
        (("user",), "U1|U2|A2||U3|U4"),
    ]:
        document = document_of_chat(chat(turns, train_on=train_on), "chatflow", "response")
        assert learnt(document) == expected, train_on


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keys": (("prompts", "q"),)}, "--chat-keys prompts=q: give NAME=KEY"),
        ({"keys": (("prompt", ""),)}, "--chat-keys prompt=: give NAME=KEY"),
        ({"keys": (("prompt", "a"), ("prompt", "b"))}, "give each name only once"),
        ({"train_on": ("last", "user")}, "--train-on last user: give all, last, or roles"),
        ({"train_on": ("human",)}, "--train-on human: give all, last, or roles"),
    ],
)
def test_wrong_settings(settings: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        ChatSettings(**settings).check()


def test_loss_on_all_and_train_on_are_not_combined(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('["a", "b"]\n')
    settings = settings_of_options(
        {
            "inputs": [str(tmp_path / "a.jsonl")],
            "output_prefix": str(tmp_path / "a"),
            "tokenizer_model": "none",
            "format": "chat",
            "loss": "all",
            "chat_train_on": ["last"],
        }
    )
    with pytest.raises(UserError, match="--train-on last: --loss all already trains every token"):
        preprocess(settings)


LIST = [message("user", "Hi"), message("assistant", "Hello")]
ARRAY = [LIST, {"prompt": "Hi", "completion": "Hello"}, ["Hi", "Hello"]]


@pytest.mark.parametrize(
    ("name", "data", "number"),
    [
        ("a.jsonl", f"{json.dumps(LIST)}\n" * 3, 3),
        ("a.jsonl", '["Hi", "Hello"]\n[["Hi", "Hello"]]\n', 2),
        ("a.json", f"{json.dumps(LIST)}\r\n{json.dumps(LIST)}", 2),
        ("a.json", json.dumps(ARRAY, indent=1), 3),
        ("a.json", json.dumps(LIST, indent=1), 1),
        ("a.json", "[]", 0),
        ("a.json", '[["user", "Hi"], ["assistant", "Hello"]]', 1),
        # Ordinary records with fields that messages have as well.
        ("a.json", json.dumps([{"role": "Alice", "prompt": "Hi", "completion": "Hello"}] * 2), 2),
        ("a.json", json.dumps([{"from": "user", "prompt": "Hi", "completion": "Hello"}] * 2), 2),
        ("a.json", json.dumps([{"role": "user", "messages": LIST}] * 2), 2),
    ],
)
def test_bare_lists_in_files(name: str, data: str, number: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data.encode())
    (file,) = find_inputs([str(tmp_path / name)])
    settings = CorpusSettings("chat", ("messages",))
    expected = document_of_chat(SIMPLE, "chatflow", "response")
    documents: list[Any] = []
    for chunk in read_chunks(file, settings):
        parsed = parse_chunk(chunk, settings)
        assert not parsed.num_dropped
        documents += parsed.documents["messages"]
    assert documents == [expected] * number


@pytest.mark.parametrize("line", ['[{"prompt": "Hi", "completion": "Hello"}]', "[]"])
def test_an_array_in_a_jsonl_file_is_refused_as_before(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{line}\n")
    (file,) = find_inputs([str(tmp_path / "a.jsonl")])
    with pytest.raises(UserError, match="begins with .* like a JSON array"):
        list(read_chunks(file, CorpusSettings("chat", ("messages",))))


def test_settings_are_recorded_only_if_they_differ(
    tmp_path: Path, tiny_sentencepiece_model: Path
) -> None:
    jobs = Jobs(tmp_path, tiny_sentencepiece_model)
    path = jobs.lines("a.jsonl", [TURNS, TURNS])
    content = jobs.run(path, corpus=CorpusSettings("chat", ("messages",)))
    assert "chats" not in content["settings"] and "train_on" not in content["template"]
    (mask, _) = jobs.masks("messages")
    corpus = CorpusSettings("chat", ("messages",), chats=ChatSettings(train_on=("last",)))
    content = jobs.run(path, corpus=corpus)
    assert content["settings"]["chats"]["train_on"] == content["template"]["train_on"] == ["last"]
    (ids, _), (last, _) = jobs.documents("messages"), jobs.masks("messages")
    tokenizer = load_tokenizer(jobs.model)
    assert tokenizer.decode([i for i, m in zip(ids, last, strict=True) if m]).strip() == "A2"
    assert sum(last) < sum(mask)


def test_the_example_of_the_page(
    tmp_path: Path, tiny_sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[3] / "docs" / "corpora.md"
    section = page.read_text(encoding="utf-8").split("\n### Other keys")[1]
    (records,) = re.findall(r"```json\n(.*?)```", section, re.S)[:1]
    (command,) = re.findall(r"```bash\n(.*?)```", section, re.S)[:1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text(records, encoding="utf-8")
    (tmp_path / ".demo" / "out").mkdir(parents=True)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["python", "tools/preprocess_data.py"]
    model = words.index(".demo/corpus/tokenizer.model")
    words[model] = str(tiny_sentencepiece_model)
    done = call_tool("preprocess_data.py", *words[2:], "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "messages: 2 documents" in done.stdout and "dropped 0" in done.stdout
    done = call_tool(
        *("preprocess_data.py", *words[2:], "--workers", 1, "--overwrite", "--loss", "all")
    )
    assert done.returncode == 2 and "--train-on last" in done.stderr

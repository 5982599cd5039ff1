"""Tests that a chat that reaches a limit of its template is a bad line with the reason."""

import json
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import Chunk
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer.chat_template import (
    JinjaTemplate,
    chat_of_exchanges,
    read_chat_template,
    render,
)
from megatron_chatflow.tokenizer.documents import TemplateLimitError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_that_reaches_a_limit_is_a_bad_line_with_the_reason() -> None:
    source = "{% if 'boom' in messages[0].content %}{{ 'a' * 10 ** 9 }}{% endif %}" + CHATML
    template = JinjaTemplate("t.jinja", source, ("<|im_end|>",))
    template.check()
    with pytest.raises(TemplateLimitError) as caught:
        template.document(chat_of_exchanges(None, (("boom", "x"),)), "response")
    assert caught.value.limit.startswith("produces more than")
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": text}, {"role": "bot", "content": "a"}]}
        )
        for text in ("one", "boom", "three")
    ]
    chunk = Chunk("c.jsonl", 1, "lines", "\n".join(lines).encode(), 0)
    settings = CorpusSettings("chat", ("messages",), chat_template=template)
    parsed = parse_chunk(chunk, settings)
    assert len(parsed.documents["messages"]) == 2
    assert parsed.num_dropped == {"template_limit": 1} and parsed.num_bad == 1
    assert str(parsed.first_bad).startswith("c.jsonl:2: template_limit: the template produces more")


def test_limits_grow_with_the_chat() -> None:
    messages = [{"role": "user", "content": "x" * (1 << 20)} for _ in range(80)]
    text = render(
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}", {"messages": messages}
    )
    assert len(text) == 80 << 20  # more than the limit for a short chat


def test_exports_name_the_limit() -> None:
    with pytest.raises(UserError, match=r"t.jinja: it produces more than \d+ characters .*another"):
        JinjaTemplate("t.jinja", "{{ 'a' * 3000000000 }}").turn_end()


def test_source_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(CHATML + " " * (1 << 20))
    with pytest.raises(UserError, match="chat template too large"):
        read_chat_template(path)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}",
         "1/3False 2/3False 3/3True "),
        ("{% for a, b in {'x': 1}.items() %}{{ a ~ b ~ none }}{% else %}no{% endfor %}", "x1None"),
        ("{% for i in [] %}{% else %}no{% endfor %}{% for i in nothing %}{% else %}no{% endfor %}",
         "nono"),
        ("{% for i in range(9) if i % 2 %}{% if i == 7 %}{% break %}{% endif %}{{ i }}{% endfor %}",
         "135"),
        ("{{ 'a' + 'b' + 'c' + 'd' + 'e' + 'f' }}{{ (1 + 2) * 3 - 2 ** 3 }}{{ 7 % 4 }}",
         "abcdef13"),
        ("{{ '%s-%d' % ('a', 3) }}{{ '{}:{:>3}'.format('a', 1) }}{{ 'a-b'.split('-')[1:] }}",
         "a-3a:  1['b']"),
        ("{{ {'b': [1, 'é']} | tojson }}{{ [1] | tojson(separators=(',', ':')) }}",
         '{"b": [1, "é"]}[1]'),
        ("{{ 'abc'[::-1] }}{{ messages[1:] | length }}{{ [3, 1] | sort | join('+') }}", "cba01+3"),
        ("{{ -2 ** 3 }}{{ 0 ** 100000 }}{{ 1 ** 100000 }}{{ 2 ** -1 }}", "-8010.5"),
        ("{% autoescape true %}{{ '<' }}{{ '<' ~ 'a' }}{% endautoescape %}", "&lt;&lt;a"),
        ("{% macro m(x) %}[{{ x }}{{ caller() }}]{% endmacro %}{% call m(1) %}c{% endcall %}",
         "[1c]"),
        ("{{ 'a b' | wordcount }}{{ 'x' | default('y') }}{{ 'a\nb' | indent(2) }}", "2xa\n  b"),
    ],
)  # fmt: skip
def test_limited_operations_have_their_usual_results(source: str, text: str) -> None:
    assert render(source, {"messages": [{"role": "user", "content": "x"}]}) == text

"""Tests that chat templates that exhaust memory or never end are stopped, with the limit named."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.parse import CorpusSettings, parse_chunk
from megatron_chatflow.preprocess.readers import Chunk
from megatron_chatflow.tokenizer.chat_template import (
    Chat,
    JinjaTemplate,
    read_chat_template,
    render,
)
from megatron_chatflow.tokenizer.documents import TemplateLimitError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NESTED = "{% set ns = namespace(s=%s) %}{% for i in range(40) %}{% set ns.s = %s %}{% endfor %}"


def doubled(start: str, step: str, end: str) -> str:
    return NESTED.replace("%s", start, 1).replace("%s", step, 1) + end


TOO_LONG = [
    "{{ 'a' * 3000000000 }}",
    "{{ 3000000000 * 'a' }}",
    "{{ [1] * 3000000000 }}",
    "{{ 'a' | center(3000000000) }}",
    "{{ 'a'.center(3000000000) }}",
    "{{ 'a'.zfill(3000000000) }}",
    "{{ ('\t' * 1000).expandtabs(100000000) }}",
    "{{ '%3000000000d' % 1 }}",
    "{{ '%*d' % (3000000000, 1) }}",
    "{{ '%.300000000f' | format(1.0) }}",
    "{{ '%(a)s' * 1000 % {'a': 'b' * 10000000} }}",
    "{{ '{:3000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 3000000000) }}",
    "{{ ('{0}' * 1000).format('b' * 10000000) }}",
    doubled("'a'", "ns.s + ns.s", "{{ ns.s }}"),
    doubled("'a'", "ns.s ~ ns.s", "{{ ns.s }}"),
    doubled("[1]", "ns.s + ns.s", "{{ ns.s | length }}"),
    "{% set a = 'a' * 10000 %}{% set b = a | replace('a', a) %}",
    "{% set a = 'a' * 10000 %}{% set b = a.replace('a', a) %}",
    "{{ range(100000) | join('a' * 1000000) }}",
    "{{ ('a' * 1000000).join(['x'] * 100000) }}",
    "{{ messages | map(attribute='content') | join('a' * 60000000) }}",
    "{{ ('a\n' * 100000) | indent(1000000) }}",
    "{{ [1] | batch(1000000000, 'x') | list | length }}",
    "{{ [1] | slice(1000000000) | list | length }}",
    "{{ 42 | round(100000000, 'ceil') }}",
    "{{ {'a': [[[1]]]} | tojson(indent=1000000000) }}",
    "{{ range(100000) | map('center', 100000) | list | length }}",
    "{{ ('a' * 10000) | wordwrap(1, true, 'b' * 100000) | length }}",
    "{{ ('a,' * 30000000).split(',') | length }}",
    "{% set a = 'a' * 30000000 %}{% set ns = namespace(l=[]) %}{% for i in range(1000) %}"
    "{% set ns.l = ns.l + [a[1:]] %}{% endfor %}",
    "{% set a = 'a' * 30000000 %}{{ ([a] * 100000) | sort | length }}",
    "{% set a = 'a' * 30000000 %}{% for i in range(100000) %}{{ a }}{% endfor %}",
    "{% for i in range(100000) %}" + "x" * 900000 + "{% endfor %}",
    "{% macro f() %}"
    + "x" * 900000
    + "{% endmacro %}{% for i in range(9999) %}{{ f() }}{% endfor %}",
    "{% block b %}"
    + "x" * 90000
    + "{% endblock %}{% for i in range(9999) %}{{ self.b() }}{% endfor %}",
]
TOO_MANY_STEPS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    doubled("[1]", "[ns.s, ns.s]", "{{ ns.s }}"),
    doubled("[1]", "{'a': ns.s, 'b': ns.s}", "{{ ns.s | tojson | length }}"),
]
OTHERS = {
    "{{ 10 ** (10 ** 8) }}": "produces an integer of more than 4096 bits",
    doubled("9", "ns.s * ns.s", ""): "produces an integer of more than 4096 bits",
    "{{ lipsum(n=100000) }}": "'lipsum' is undefined",
    "{{ (1).to_bytes(3000000000, 'big') }}": "'to_bytes' of 'int' object is unsafe",
    "{{ 'a'.translate({97: 'b' * 1000000}) }}": "'translate' of 'str' object is unsafe",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "recursion",
}
PROGRAM = """
import json, re, sys
from megatron_chatflow.tokenizer.chat_template import JinjaTemplate
for source in json.load(sys.stdin):
    try:
        JinjaTemplate("t.jinja", source).check()
        reason = "none"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    # Not ru_maxrss, which a child takes over from its parent.
    max_kib = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
    print(json.dumps([reason, max_kib]))
"""


def test_templates_end_within_memory_and_time() -> None:
    expected = {
        **dict.fromkeys(TOO_LONG, "it produces more than"),
        **dict.fromkeys(TOO_MANY_STEPS, "it takes more than 1000500 steps"),
        **OTHERS,
    }

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(list(expected)),
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    for (source, reason), (outcome, _) in zip(expected.items(), outcomes, strict=True):
        assert reason in outcome and outcome.startswith("UserError"), (source[:100], outcome)
    assert outcomes[-1][1] < 400 << 10  # KiB


def test_a_chat_that_reaches_a_limit_is_a_bad_line_with_the_reason() -> None:
    source = "{% if 'boom' in messages[0].content %}{{ 'a' * 10 ** 9 }}{% endif %}" + CHATML
    template = JinjaTemplate("t.jinja", source, ("<|im_end|>",))
    template.check()
    with pytest.raises(TemplateLimitError) as caught:
        template.document(Chat(None, (("boom", "x"),)), "response")
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

"""Tests that chat templates that exhaust memory or never end are stopped, with the limit named."""

import json
import resource
import subprocess
import sys

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

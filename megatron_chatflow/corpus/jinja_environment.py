"""The sandbox in which chat templates run, with what `transformers` offers them.

In: nothing. Out: a jinja2 environment. Not among its functions is the time of day: what a template
writes would depend on when the corpus was prepared.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationExtension(Extension):
    """`{% generation %}...{% endgeneration %}` around an answer."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Turns the block into a call of `_marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: Context, caller: Callable[[], str]) -> str:
        begin, end = context.get("generation_begin", ""), context.get("generation_end", "")
        return f"{begin}{caller()}{end}"


def environment() -> ImmutableSandboxedEnvironment:
    """A new environment, with the settings that chat templates are written for."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, GenerationExtension]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    return made


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

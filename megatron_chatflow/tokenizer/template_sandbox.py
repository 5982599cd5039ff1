"""The sandbox for chat templates, with limits on time, steps and characters.

jinja2's sandbox prevents a template from accessing the system, but not from evaluating
`10 ** 10 ** 8` or `'a' * 3000000000`, and such a call cannot be interrupted. Every operation with a
result that may be much larger than its operands is therefore charged to a budget before it runs:
operators, `~`, filters, string methods, and output. Loop iterations and calls are counted as steps,
and a deadline is checked every 16 steps. The numbers of steps and characters depend only on the
template and the chat, so the same chats are dropped on every machine. The deadline is the last
resort.

The environment provides what transformers provides to templates, except the current time, because
a corpus must not depend on it.
"""

import json
import re
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    Sized,
    ValuesView,
)
from collections.abc import Set as AbstractSet
from functools import wraps
from threading import RLock
from types import BuiltinMethodType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from markupsafe import Markup, escape

from megatron_chatflow.tokenizer.documents import TemplateLimitError

MAX_SECONDS = 10.0
MAX_STEPS = 1_000_000
STEPS_PER_MESSAGE = 100
# Counts all strings that a rendering creates, not only those that exist at the same time.
MAX_CHARACTERS = 1 << 26
CHARACTERS_PER_INPUT_CHARACTER = 16
MAX_INT_BITS = 1 << 12
MAX_ROUND_PRECISION = 300
_ELEMENT_CHARACTERS = 8  # charge for a list element: the size of a pointer
_OBJECT_CHARACTERS = 64  # charge for a small object
_CONTAINER_CHARACTERS = 256
_URLIZE_FACTOR = 32
_NUM_ADDED_AT_ONCE = 4
_STEPS_BETWEEN_CLOCKS = 16
_VALUE_CHARACTERS = 24  # text length of a number or of an empty object

# Filters that return a number, their value, or references to its elements.
_STRUCTURAL_FILTERS = frozenset(
    "length count first last default d items map select reject selectattr rejectattr attr "
    "random abs int float".split()
)
# String methods that return a number or a boolean.
_QUERIES = frozenset(
    "startswith endswith find rfind index rindex count isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper".split()
)
_UNSAFE_METHODS = frozenset(["to_bytes", "translate"])
_DIGITS = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r"\{[^{}]*:[^{}]*\{")


class GenerationExtension(Extension):
    """Implements `{% generation %}...{% endgeneration %}`, which marks an answer."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Parses the block into a call of `_marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: Context, caller: Callable[[], str]) -> str:
        begin, end = context.get("generation_begin", ""), context.get("generation_end", "")
        return f"{begin}{caller()}{end}"


_COUNTED = nodes.EnvironmentAttribute("counted")


class _LimitedCodeGenerator(CodeGenerator):
    """Compiles loops, slices, `+` and `~` to methods of the environment that charge them."""

    environment: "LimitedEnvironment"

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:  # noqa: N802
        self.environment.size_of_literals = _size_of_literals(node)
        super().visit_Template(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        size = nodes.Const(_size_of_literals(node))
        node.iter = nodes.Call(_COUNTED, [node.iter, size], [], None, None).set_lineno(node.lineno)
        super().visit_For(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:  # noqa: N802
        if node.node is not _COUNTED:
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.write("environment.counted(")
        self.visit(node.args[0], frame)
        self.write(", ")
        self.visit(node.args[1], frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        is_slice = isinstance(node.arg, nodes.Slice)
        self.write("environment.charged(" if is_slice else "")
        super().visit_Getitem(node, frame)
        self.write(")" if is_slice else "")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:  # noqa: N802
        # Charge once for up to four operands. The intermediate results before it are small.
        num_inner = getattr(node, "num_outer_operators", 0)
        if isinstance(node.left, nodes.Add) and num_inner < _NUM_ADDED_AT_ONCE - 2:
            node.left.num_outer_operators = num_inner + 1  # type: ignore[attr-defined]
        self.write("" if num_inner else "environment.charged(")
        super().visit_Add(node, frame)
        self.write("" if num_inner else ")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concatenate(context, (")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile:
            self.write(
                "(environment.escaped if context.eval_ctx.autoescape else environment.text)("
            )
        else:
            self.write(f"environment.{'escaped' if frame.eval_ctx.autoescape else 'text'}(")


def _size_of_literals(node: nodes.Node) -> int:
    """Returns the charge for the literal texts and containers in a part of a template."""
    size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    size += sum(len(text.value) for text in node.find_all(nodes.Const) if type(text.value) is str)
    for container in node.find_all((nodes.List, nodes.Tuple, nodes.Dict)):
        if getattr(container, "ctx", "load") == "load":  # excludes the targets of a loop
            size += _CONTAINER_CHARACTERS + _OBJECT_CHARACTERS * len(container.items)  # type: ignore[attr-defined]
    return size


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that stops a rendering at its limits and renders one template at a time."""

    code_generator_class = _LimitedCodeGenerator
    intercepted_binops = frozenset(["*", "**", "%"])
    size_of_literals = 0  # charge for the literals of the template

    def __init__(self) -> None:
        """Creates an environment with the jinja2 settings that chat templates expect."""
        self._lock = RLock()
        self._begin(0, 0)
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, GenerationExtension],
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: self._limited(name, f) for name, f in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        del self.globals["lipsum"]

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Renders a template. The limits grow with the size of `messages` and `tools`.

        Raises:
            TemplateLimitError: If the rendering exceeds a limit.
            Exception: Any other error of the template.
        """
        messages = variables.get("messages", ())
        num_characters = sum(_num_characters(message) for message in messages)
        num_characters += _num_characters(variables.get("tools", ()))
        with self._lock:
            self._begin(len(messages), num_characters)
            try:
                return template.render(variables)
            except MemoryError as error:
                raise TemplateLimitError("runs out of memory") from error

    def _begin(self, num_messages: int, num_characters: int) -> None:
        self._max_steps = MAX_STEPS + STEPS_PER_MESSAGE * num_messages
        self._max_characters = MAX_CHARACTERS + CHARACTERS_PER_INPUT_CHARACTER * num_characters
        self._steps_left = self._max_steps
        self._characters_left = self._max_characters
        self._deadline = 0.0

    def _step(self, num_characters: int = 0) -> None:
        """Counts an iteration or a call as one step and charges the characters it creates."""
        self._steps_left -= 1
        self._characters_left -= num_characters
        self._check()

    def _check(self) -> None:
        if self._steps_left < 0:
            raise TemplateLimitError(f"takes more than {self._max_steps} steps")
        if self._characters_left < 0:
            raise TemplateLimitError(f"produces more than {self._max_characters} characters")
        if not self._steps_left % _STEPS_BETWEEN_CLOCKS:
            now = time.perf_counter()
            if not self._deadline:  # set late, because most renderings end earlier
                self._deadline = now + MAX_SECONDS
            elif now > self._deadline:
                raise TemplateLimitError(f"takes more than {MAX_SECONDS:g} seconds")

    def _charge(self, num_characters: int) -> None:
        """Charges the characters that an operation creates."""
        self._characters_left -= num_characters
        if self._characters_left < 0:
            self._check()

    def counted(self, iterable: Iterable[Any], size_of_body: int) -> Iterator[Any]:
        """Yields the elements of a loop and counts each as a step."""
        for element in iterable:
            self._steps_left -= 1
            self._characters_left -= size_of_body
            if (
                self._steps_left < 0
                or self._characters_left < 0
                or not self._steps_left % _STEPS_BETWEEN_CLOCKS
            ):
                self._check()
            yield element

    def charged(self, value: Any) -> Any:
        """Charges a slice or a result of `+`. Both are not much longer than their operands."""
        if type(value) is str:
            self._characters_left -= len(value)
            if self._characters_left < 0:
                self._check()
        elif isinstance(value, str | bytes):
            self._charge(len(value))
        elif isinstance(value, Sized):
            self._charge(_ELEMENT_CHARACTERS * len(value))
        return value

    def concatenate(self, context: Context, operands: Sequence[Any]) -> str:
        """Applies the operator `~`."""
        size = 0
        for operand in operands:
            size += len(operand) if type(operand) is str else self._text_size(operand)
        self._charge(size)
        return markup_join(operands) if context.eval_ctx.autoescape else str_join(operands)

    def text(self, value: Any) -> str:
        """Converts the value of `{{ }}` to text. Strings are charged later, in `concat`."""
        if type(value) is str:
            return value
        self._charge(self._text_size(value))
        return str(value)

    def escaped(self, value: Any) -> Markup:
        """Converts the value of `{{ }}` to escaped text, for `autoescape`."""
        self._charge(self._text_size(value))
        return escape(value)

    def concat(self, texts: Iterable[str]) -> str:
        """Joins and charges the texts of an output."""
        texts = list(texts)
        self._charge(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charges and applies a binary operator."""
        if operator == "%":
            if isinstance(left, str | bytes):
                self._charge(self._percent_size(left, right))
        elif isinstance(left, int) and isinstance(right, int):
            num_bits = (
                left.bit_length() * max(right, 0)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if num_bits > MAX_INT_BITS and abs(left) > 1:
                raise TemplateLimitError(f"produces an integer of more than {MAX_INT_BITS} bits")
        elif operator == "*":
            sequence, factor = (left, right) if isinstance(left, Sized) else (right, left)
            if isinstance(sequence, Sized) and isinstance(factor, int):
                size = 1 if isinstance(sequence, str | bytes) else _ELEMENT_CHARACTERS
                self._charge(size * len(sequence) * max(factor, 0))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Charges and calls a function, a macro or a method."""
        self._step(_CONTAINER_CHARACTERS)  # the call may return a namespace or a dictionary
        if type(function) is BuiltinMethodType:
            owner = function.__self__
            if isinstance(owner, str | bytes):
                args = self._charge_method(owner, function.__name__, args)
        elif isinstance(function, Macro | BlockReference):
            self._charge(self.size_of_literals)
        elif isinstance(owner := getattr(function, "__self__", None), Markup):
            args = self._charge_method(owner, function.__name__, args)
        return super().call(context, function, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Returns whether a template may use an attribute."""
        return attr not in _UNSAFE_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Wraps `str.format` and `str.format_map` to charge their results."""
        function = super().wrap_str_format(value)
        if function is None:
            return None
        pattern: str = value.__self__
        formatted = function

        def limited(*args: Any, **kwargs: Any) -> str:
            given = [*args, *kwargs.values()]
            size = sum(map(self._text_size, given)) * (1 + pattern.count("{"))
            if _NESTED_FIELD.search(pattern):  # a width may be an argument
                size += sum(abs(number) for number in given if isinstance(number, int))
            self._charge(size + len(pattern) + _sum_of_numbers(pattern))
            return formatted(*args, **kwargs)

        return limited

    def _charge_method(self, owner: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Charges the result of a string method. Returns the arguments to call it with."""
        if name in _QUERIES or name.startswith("format"):
            return args
        size = len(owner)
        if name in ("center", "ljust", "rjust", "zfill"):
            size += _number(args, 0, 0)
        elif name == "expandtabs":
            size += owner.count("\t" if isinstance(owner, str) else b"\t") * _number(args, 0, 8)
        elif name == "replace" and len(args) > 1:
            size += _replaced_size(owner, args[0], args[1])
        elif name in ("split", "rsplit"):
            separator = args[0] if args else None
            num_parts = size // 2 if separator is None else owner.count(separator)
            limit = _number(args, 1, -1)
            size += _OBJECT_CHARACTERS * (1 + (num_parts if limit < 0 else min(num_parts, limit)))
        elif name == "splitlines":
            size *= _OBJECT_CHARACTERS
        elif name == "join" and args:
            elements = list(args[0])
            args = (elements, *args[1:])
            size = self._text_size(elements) + size * len(elements)
        self._charge(size)
        return args

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a filter to charge its result before it runs."""
        position = 1 if hasattr(function, "jinja_pass_arg") else 0
        sizes: dict[str, Callable[[Any, tuple[Any, ...]], int]] = {
            "batch": lambda value, args: self._list_size(value) + _number(args, 0, 1),
            "center": lambda value, args: self._text_size(value) + _number(args, 0, 80),
            "format": lambda value, args: self._percent_size(value, args),
            "indent": self._indented_size,
            "join": lambda value, args: (
                self._text_size(value) + len(value) * self._text_size(args[0] if args else "")
            ),
            "list": lambda value, args: self._list_size(value),
            "reverse": lambda value, args: len(value) if isinstance(value, str) else 0,
            "replace": lambda value, args: (
                self._text_size(value) + _replaced_size(str(value), *args[:2])
                if len(args) > 1
                else 0
            ),
            "round": lambda value, args: (
                0 if abs(_number(args, 0, 0)) <= MAX_ROUND_PRECISION else self._max_characters + 1
            ),
            "slice": lambda value, args: (
                self._list_size(value) + _OBJECT_CHARACTERS * _number(args, 0, 1)
            ),
            "tojson": lambda value, args: self._text_size(
                value, next((_length(arg) for arg in args if not isinstance(arg, bool)), 0)
            ),
            "pprint": lambda value, args: self._text_size(value, 1),
            "wordwrap": self._product_size,
            # The factor also covers its running time, because no deadline can interrupt it.
            "urlize": lambda value, args: _URLIZE_FACTOR * self._product_size(value, args),
        }
        size_of = sizes.get(name, self._sum_of_sizes)
        is_simple = not position and name not in _LONGER_BY_DEFAULT
        is_structural = name in _STRUCTURAL_FILTERS
        consumes = name in ("join", "list", "sum", "sort", "unique", "min", "max", "groupby")

        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            if is_simple and len(args) == 1 and not kwargs and type(args[0]) is str:
                self._characters_left -= _OBJECT_CHARACTERS + len(args[0])
                if self._characters_left < 0:
                    self._check()
                return function(args[0])
            self._step(_OBJECT_CHARACTERS)
            if is_structural:
                return function(*args, **kwargs)
            before, value, others = args[:position], args[position], args[position + 1 :]
            if consumes and not isinstance(value, Sized | Undefined):
                value = list(value)
            self._charge(size_of(value, (*others, *kwargs.values())))
            return function(*before, value, *others, **kwargs)

        return limited

    def _sum_of_sizes(self, value: Any, args: tuple[Any, ...]) -> int:
        return self._text_size(value) + sum(map(self._text_size, args))

    def _product_size(self, value: Any, args: tuple[Any, ...]) -> int:
        factor = 1 + sum(len(arg) for arg in args if isinstance(arg, str))
        return self._text_size(value) * factor

    def _indented_size(self, value: Any, args: tuple[Any, ...]) -> int:
        width = max((_length(arg) for arg in args if not isinstance(arg, bool)), default=4)
        text = str(value) if isinstance(value, str) else ""
        return self._text_size(value) + (1 + text.count("\n")) * width

    def _list_size(self, value: Any) -> int:
        if not isinstance(value, Sized):
            return 0  # a filter's generator; its elements are charged one by one
        size = _OBJECT_CHARACTERS if isinstance(value, str) else _ELEMENT_CHARACTERS
        return size * len(value)

    def _percent_size(self, pattern: Any, values: Any) -> int:
        """Bounds the length of the result of `pattern % values`."""
        text = pattern.decode("latin-1") if isinstance(pattern, bytes) else str(pattern)
        size = self._text_size(values)
        if isinstance(values, Mapping):
            size *= 1 + text.count("%")
        given = values if isinstance(values, tuple) else (values,)
        if "*" in text:
            size += sum(abs(number) for number in given if isinstance(number, int))
        return len(text) + size + _sum_of_numbers(text)

    def _text_size(self, value: Any, indent: int = 0, depth: int = 0) -> int:
        """Estimates the number of characters of `str(value)`.

        Every element of a container is counted as a step. A shared element is counted each time it
        is written, because nested sharing can make the text exponentially long.
        """
        if isinstance(value, str | bytes):
            return len(value)
        if value is None or isinstance(value, float | Undefined):
            return _VALUE_CHARACTERS
        if isinstance(value, int):
            return _VALUE_CHARACTERS + value.bit_length() // 3
        if isinstance(value, Namespace):
            value = value._Namespace__attrs
        size = _VALUE_CHARACTERS + indent * depth
        if isinstance(value, Mapping | ItemsView):
            for key, element in value.items() if isinstance(value, Mapping) else value:
                self._step()
                size += self._text_size(key) + self._text_size(element, indent, depth + 1)
                size += indent * depth
                if size > self._characters_left:
                    break
        elif isinstance(value, list | tuple | AbstractSet | KeysView | ValuesView):
            for element in value:
                self._step()
                size += self._text_size(element, indent, depth + 1)
                if size > self._characters_left:
                    break
        return size


# Filters that may return more than their value even without arguments.
_LONGER_BY_DEFAULT = frozenset(["batch", "center", "indent", "list", "slice", "urlize", "wordwrap"])


def _number(args: Sequence[Any], position: int, default: int) -> int:
    value = args[position] if position < len(args) else default
    return value if isinstance(value, int) else 0  # the operation itself rejects other types


def _length(value: Any) -> int:
    """Returns the length of an indentation that is given as a number or a text."""
    if isinstance(value, int):
        return max(value, 0)
    return len(value) if isinstance(value, str) else 0


def _replaced_size(text: Any, old: Any, new: Any) -> int:
    if not isinstance(old, type(text) | str) or not isinstance(new, Sized):
        return 0
    return int(text.count(old)) * len(new)


def _sum_of_numbers(pattern: str) -> int:
    """Sums all numbers in a format string, including its widths and precisions."""
    return sum(int(digits) if len(digits) < 10 else 10**10 for digits in _DIGITS.findall(pattern))


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _num_characters(value: Any) -> int:
    """Returns the number of characters of all texts in nested lists and objects."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list | tuple) else 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    options: dict[str, Any] = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

"""A Jinja environment for templates of strangers: they reach no Python, and they end, in seconds and in memory.

Jinja's sandbox bounds neither nested loops nor the size of values. So every pass of a loop, every call, filter and
operator is counted (STEPS), the sizes of all texts and lists that are built are added up (WORK), and a value that would
be too large is refused before it is built (TEXT characters, ITEMS of containers, BITS of a number). No template that
renders a conversation comes near these limits.
"""

import re
import types
from collections.abc import Callable, Container, Iterator
from functools import wraps
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

STEPS = 20_000_000  # of a conversation in all its renderings; ten are an empty pass of a loop, a microsecond
WORK = 3 * 10**8  # characters that are read or written for it, each item of a list counted as ITEM of them
ITEM = 50
TEXT = 10**7  # characters of one value
ITEMS = 10**6  # of one value, nested ones included
BITS = 10_000  # of one number
WIDTH = 10**6  # of padding, and any other number that a filter or method takes
NUMBERS = ["default", "d", "int", "float", "truncate"]  # filters whose numbers do not lengthen anything
MULTIPLIES = ["wordwrap", "indent", "urlize", "xmlattr"]  # filters that insert a text as often as the value asks for
# Filter -> steps for each character and item.
SLOW = dict.fromkeys(["urlize", "wordwrap", "striptags", "title", "wordcount", "batch", "slice"], 10)
SLOW |= {"min": 20, "max": 20, "sort": 30, "dictsort": 30, "unique": 30, "groupby": 60}
# Filters that take a text apart into its characters.
ITERATES = ["list", "sort", "map", "select", "reject", "selectattr", "rejectattr", "groupby"]
ITERATES += ["batch", "slice", "unique", "sum", "min", "max", "join", "items"]
# Filters and tests that look only at a value's type, its length or one of its items, and copy nothing: a conversation
# that a template passes to them in a loop is not measured each time.
CONSTANT_FILTERS = ["length", "count", "first", "last", "default", "d", "attr"]
CONSTANT_TESTS = ["defined", "undefined", "none", "boolean", "true", "false", "integer", "float", "number", "string"]
CONSTANT_TESTS += ["mapping", "sequence", "iterable", "callable", "sameas", "filter", "test", "escaped"]
HOLDERS = (list, tuple, dict, set, frozenset)
TEXTS = (str, bytes)


class TooMuch(jinja2.TemplateError):
    """A template asks for more than any conversation needs."""


class Size(NamedTuple):
    characters: int
    items: int


class Bounded(ImmutableSandboxedEnvironment):
    """Call ``begin`` before the renderings of each conversation: they share one budget."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False, finalize=self.wrote)
        del self.globals["lipsum"]
        for name, function in self.filters.items():
            self.filters[name] = self.bounded(name, function, CONSTANT_FILTERS)
        for name, function in self.tests.items():
            self.tests[name] = self.bounded(name, function, CONSTANT_TESTS)
        self.count, self.measure = self.step, self.copied  # one object each, which ``call`` knows
        self.begin()

    def begin(self, turns: int = 0) -> None:
        """A conversation of many ``turns`` has a larger budget, as some templates are rendered for each of them."""
        self.steps = 0
        self.work = 0
        self.share = 1 + turns // 200

    def step(self, number: int = 10) -> str:
        self.steps += number
        if self.steps > STEPS * self.share:
            raise TooMuch(f"it takes more than {STEPS * self.share:,} steps")
        return ""

    def passes(self, values: Any) -> Iterator[Any]:
        """The values of a loop that picks some of them, each counted."""
        for value in values:
            self.step()
            yield value

    def copied(self, value: Any) -> Any:
        """The value, once its size is counted."""
        self._add(self._size(value))
        return value

    def wrote(self, value: Any) -> Any:
        return value if isinstance(value, jinja2.Undefined) else self.copied(value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.step()
        for value in (left, right):
            if isinstance(value, int):
                _require_bits(value.bit_length())
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require_bits(left.bit_length() * max(right, 0))
        elif operator == "*":
            self._check_repeated(left, right)
            self._check_repeated(right, left)
        elif operator == "%" and isinstance(left, TEXTS):
            self._check_format(left, right)
        return self.copied(super().call_binop(context, operator, left, right))

    def _check_repeated(self, value: Any, times: Any) -> None:
        if isinstance(times, int) and isinstance(value, (*TEXTS, list, tuple)):
            size = self._size(value)
            _require_size(size.characters * max(times, 0), size.items * max(times, 0))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are Jinja's: no keyword argument of a template can be one of them.
        if __obj is __self.count or __obj is __self.measure:
            return __obj(*args)
        __self.step(30)
        if isinstance(__obj, types.BuiltinMethodType):
            owner = __obj.__self__
            if isinstance(owner, (str, bytes, int, float)):
                args = __self._checked(__obj.__name__, owner, args, kwargs)
            elif isinstance(owner, (list, tuple)):
                __self.copied(owner)  # count and index go over it
        return __self.copied(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        template, is_map = value.__self__, value.__name__ == "format_map"

        def format_text(*args: Any, **kwargs: Any) -> str:
            if is_map:
                args, kwargs = (), args[0]
            return _Formatter(self).vformat(template, args, kwargs)

        return format_text

    def bounded(self, name: str, function: Callable[..., Any], constant: Container[str] = ()) -> Callable[..., Any]:
        """A filter or test with its arguments and result checked, unless ``constant`` has its name."""
        before = hasattr(function, "jinja_pass_arg")  # it gets Jinja's context or environment first

        @wraps(function)  # with the mark for what it gets first
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.step(60)
            value = args[before]
            is_generator = isinstance(value, types.GeneratorType)
            if name in constant and not (is_generator and name in CONSTANT_FILTERS):
                return function(*args, **kwargs)
            if is_generator:
                value = list(value)
            rest = self._checked(name, value, args[before + 1 :], kwargs)
            return self.copied(function(*args[:before], value, *rest, **kwargs))

        return bounded

    def _checked(self, name: str, value: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The arguments of a filter or method, after a check that it may be run with them."""
        args = tuple(list(arg) if isinstance(arg, types.GeneratorType) else arg for arg in args)
        given = [*args, *kwargs.values()]
        numbers = [arg for arg in given if isinstance(arg, int)]
        if name not in NUMBERS and any(abs(number) > WIDTH for number in numbers):
            raise TooMuch(f"{name} is given a number above {WIDTH:,}")
        if name == "sum" and any(isinstance(arg, HOLDERS) for arg in given):  # each sum is a copy of all before
            raise TooMuch("sum is given a list to start from")
        size = self._size(value)
        self._add(size)
        self.step(sum(size) * SLOW.get(name, 0))
        is_text = isinstance(value, TEXTS)
        if is_text and name in ITERATES and not hasattr(value, name):
            _require_size(size.characters, size.characters)
        if name == "format":
            self._check_format(value, tuple(given))
        elif name == "join" and is_text:  # the method
            parts = self._size(args[0]) if args else Size(0, 0)
            _require_size(parts.characters + parts.items * size.characters, parts.items)
        else:
            _require_size(_characters_made(name, value, given, size), size.items)
        return args

    def _check_format(self, template: Any, values: Any) -> None:
        """Of ``%``: a width stands in the template, or it is one of the values."""
        text = template if isinstance(template, str) else repr(template)
        _require_width(text)
        given = values if isinstance(values, tuple) else (values,)
        if "*" in text and any(isinstance(value, int) and abs(value) > WIDTH for value in given):
            raise TooMuch(f"a format has a width above {WIDTH:,}")
        size = self._size(values)
        _require_size(len(text) + size.characters * text.count("%"), size.items)

    def _size(self, value: Any) -> Size:
        """The size of a value, each part counted as often as it is reached. TooMuch above TEXT and ITEMS."""
        if isinstance(value, TEXTS):
            return Size(len(value), 0)
        if isinstance(value, range):
            return Size(0, len(value))
        if not isinstance(value, HOLDERS):
            return Size(0, 0)
        characters, items, left = 0, 0, [value]
        while left:
            each = left.pop()
            self.steps += 20  # many small ones take longer than their items
            parts = [*each, *each.values()] if isinstance(each, dict) else each
            # By the types that occur: most lists hold one, and isinstance of each item would take twice as long.
            kinds = set(map(type, parts))
            texts = tuple(kind for kind in kinds if issubclass(kind, TEXTS))
            if texts:
                characters += sum(len(part) for part in parts if isinstance(part, texts))
            holders = tuple(kind for kind in kinds if issubclass(kind, HOLDERS))
            if holders:
                left += [part for part in parts if isinstance(part, holders)]
            items += len(parts)
            _require_size(characters, items + len(left))
        return Size(characters, items)

    def _add(self, size: Size) -> None:
        self.work += size.characters + ITEM * size.items
        if self.work > WORK * self.share:
            raise TooMuch(f"it copies more than {WORK * self.share:,} characters")


def _characters_made(name: str, value: Any, given: list, size: Size) -> int:
    """The most characters that a filter or method may write, 0 if they are no more than it gets."""
    characters, items = size
    texts = [arg for arg in given if isinstance(arg, TEXTS)]
    lengths = [len(text) for text in texts]
    numbers = [abs(arg) for arg in given if isinstance(arg, int)]
    if name == "replace" and len(texts) > 1:
        times = str(value).count(texts[0]) if isinstance(texts[0], str) else characters
        return characters + times * lengths[1]
    if name == "join":
        return characters + items * sum(lengths)
    if name in MULTIPLIES:
        return (characters + items) * max([1, *lengths, *numbers])
    if name == "expandtabs":
        return characters * max([8, *numbers])
    if name == "tojson":  # indented by a number or a text
        return characters + items * max([1, *numbers, *lengths])
    return 0


def _require_size(characters: int, items: int) -> None:
    if characters > TEXT:
        raise TooMuch(f"a text has more than {TEXT:,} characters")
    if items > ITEMS:
        raise TooMuch(f"a list has more than {ITEMS:,} items")


def _require_bits(bits: int) -> None:
    if bits > BITS:
        raise TooMuch(f"a number has more than {BITS:,} bits")


def _require_width(template: str) -> None:
    if re.search(r"\d{7}", template):
        raise TooMuch(f"a format has a width above {WIDTH:,}")


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        _require_width(format_spec)
        return super().format_field(value, format_spec)


class _Counted(NodeTransformer):
    """Counts the passes of loops and macros by the size of what they run, and makes of ``a ~ b`` the filter join."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        node = self._counted(node)
        if node.test is not None:
            node.iter = _call("passes", node.iter)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._counted(node)

    visit_CallBlock = visit_Macro

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        node = self.generic_visit(node)
        node.ops[0].expr = self._measured(node.ops[0].expr)  # x in a long text, or equal to it
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node = self.generic_visit(node)
        return self._measured(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        node = self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None, lineno=node.lineno)

    def _measured(self, node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else _call("measure", node)

    def _counted(self, node: Any) -> Any:
        cost = 10 + sum(1 for _ in node.find_all(nodes.Expr)) // 2
        cost += sum(len(text.data) for text in node.find_all(nodes.TemplateData)) // 10
        node = self.generic_visit(node)
        count = _call("count", nodes.Const(cost))
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node


def _call(method: str, argument: nodes.Expr) -> nodes.Call:
    """A call of a method of the environment, in a template's syntax tree."""
    return nodes.Call(nodes.EnvironmentAttribute(method), [argument], [], None, None, lineno=argument.lineno)

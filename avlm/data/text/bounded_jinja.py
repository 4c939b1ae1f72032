"""A Jinja environment for templates of strangers: they reach no Python, and they end, in seconds and in memory.

Jinja's sandbox bounds neither nested loops nor what is built. So every pass of a loop, every call, filter and operator
is counted (STEPS), every text and list that is built is added up (WORK), and what would be too large is refused before
it is built (TEXT characters, ITEMS of containers, BITS of a number). None of it can be reached by a template that
renders a conversation.
"""

import re
import types
from collections.abc import Callable, Container, Iterator
from functools import wraps
from typing import Any

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
NUMBERS = ("default", "d", "int", "float", "truncate")  # filters whose numbers make nothing longer
MULTIPLIES = ("wordwrap", "indent", "urlize", "xmlattr")  # filters that insert a text as often as the value asks for
SLOW = {"sort": 30, "groupby": 60, "dictsort": 30, "unique": 30, "min": 20, "max": 20, "urlize": 10, "wordwrap": 10}
SLOW |= {"striptags": 10, "title": 10, "wordcount": 10, "batch": 10, "slice": 10}  # filter -> steps for each part
# Filters that take a text apart into its characters.
ITERATES = ("list", "sort", "map", "select", "reject", "selectattr", "rejectattr", "groupby")
ITERATES += ("batch", "slice", "unique", "sum", "min", "max", "join", "items")
# Filters and tests that look at no more of a value than its type, its length or one of its items, and build nothing: a
# conversation that a template passes to them in a loop is not gone over each time.
CONSTANT_FILTERS = {"length", "count", "first", "last", "default", "d", "attr"}
CONSTANT_TESTS = {"defined", "undefined", "none", "boolean", "true", "false", "integer", "float", "number", "string"}
CONSTANT_TESTS |= {"mapping", "sequence", "iterable", "callable", "sameas", "filter", "test", "escaped"}
HOLDERS = (list, tuple, dict, set, frozenset)


class TooMuch(jinja2.TemplateError):
    """What a template asks for is more than any conversation needs."""


class Bounded(ImmutableSandboxedEnvironment):
    """``begin()`` before the renderings of a conversation, whose whole output must pass ``wrote``."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False, finalize=self.wrote)
        del self.globals["lipsum"]
        self.filters = {name: self.bounded(name, each, CONSTANT_FILTERS) for name, each in self.filters.items()}
        self.tests = {name: self.bounded(name, each, CONSTANT_TESTS) for name, each in self.tests.items()}
        self.count, self.measure = self.step, self.copied  # one object each, which ``call`` knows
        self.begin()

    def begin(self, turns: int = 0) -> None:
        """``turns`` of a conversation that is long enough to be allowed more: some templates render each of them."""
        self.steps, self.work, self.share = 0, 0, 1 + turns // 200

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
        self._add(*self._size(value))
        return value

    def wrote(self, value: Any) -> Any:
        return value if isinstance(value, jinja2.Undefined) else self.copied(value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.step()
        for value in (left, right):
            if isinstance(value, int) and value.bit_length() > BITS:
                raise TooMuch(f"a number has more than {BITS:,} bits")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._require(left.bit_length() * max(right, 0) <= BITS, f"a number has more than {BITS:,} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, bytes, list, tuple)):
                    self._check_size(*(size * max(times, 0) for size in self._size(value)))
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._check_format(left, right)
        return self.copied(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are Jinja's: no keyword argument of a template can be one of them.
        if __obj is __self.count or __obj is __self.measure:
            return __obj(*args)
        __self.step(30)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, (str, bytes, int, float)):
            args = __self._checked(__obj.__name__, __obj.__self__, args, kwargs)
        elif isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, (list, tuple)):
            __self.copied(__obj.__self__)  # count and index go over it
        return __self.copied(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        template, is_map = value.__self__, value.__name__ == "format_map"

        def format_text(*args: Any, **kwargs: Any) -> str:
            args, kwargs = ((), args[0]) if is_map else (args, kwargs)
            return _Formatter(self).vformat(template, args, kwargs)

        return format_text

    def bounded(self, name: str, function: Callable[..., Any], constant: Container[str] = ()) -> Callable[..., Any]:
        """A filter or test whose arguments and result are checked, unless its time is ``constant``."""
        before = hasattr(function, "jinja_pass_arg")  # it gets Jinja's context or environment first

        @wraps(function)  # with the mark for what it gets first
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.step(60)
            first, (value, *rest) = args[:before], args[before:]
            is_generator = isinstance(value, types.GeneratorType)
            if name in constant and not (is_generator and name in CONSTANT_FILTERS):
                return function(*args, **kwargs)
            if is_generator:
                value = list(value)
            value, *rest = value, *self._checked(name, value, tuple(rest), kwargs)
            return self.copied(function(*first, value, *rest, **kwargs))

        return bounded

    def _checked(self, name: str, value: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The arguments of a filter or method, which may be run with them."""
        args = tuple(list(arg) if isinstance(arg, types.GeneratorType) else arg for arg in args)
        given = [*args, *kwargs.values()]
        if name not in NUMBERS and any(isinstance(arg, int) and abs(arg) > WIDTH for arg in given):
            raise TooMuch(f"{name} is given a number above {WIDTH:,}")
        characters, items = self._size(value)
        self._add(characters, items)
        self.step((characters + items) * SLOW.get(name, 0))
        if name == "sum" and any(isinstance(arg, HOLDERS) for arg in given):  # each sum is a copy of all before
            raise TooMuch("sum is given a list to start from")
        if isinstance(value, (str, bytes)) and name in ITERATES and not hasattr(value, name):
            self._check_size(characters, characters)
        texts = [len(arg) for arg in given if isinstance(arg, (str, bytes))]
        if name == "replace" and len(texts) > 1:
            old = next(arg for arg in given if isinstance(arg, (str, bytes)))
            times = str(value).count(old) if isinstance(old, str) else characters
            self._check_size(characters + times * texts[1], items)
        elif name == "join" and isinstance(value, (str, bytes)):  # the method
            parts, number = self._size(args[0]) if args else (0, 0)
            self._check_size(parts + number * characters, number)
        elif name == "join":
            self._check_size(characters + items * sum(texts), items)
        elif name in MULTIPLIES:
            numbers = [arg for arg in given if isinstance(arg, int)]
            self._check_size((characters + items) * max([1, *texts, *map(abs, numbers)]), items)
        elif name == "expandtabs":
            self._check_size(characters * max([8, *(arg for arg in given if isinstance(arg, int))]), 0)
        elif name == "format":
            self._check_format(value, tuple(given))
        elif name == "tojson":
            depth = max(
                [1, *(arg if isinstance(arg, int) else len(arg) for arg in given if isinstance(arg, (int, str)))]
            )
            self._check_size(characters + items * depth, items)
        return args

    def _check_format(self, template: Any, values: Any) -> None:
        """Of ``%``: a width stands in the template, or it is one of the values."""
        text = template if isinstance(template, str) else repr(template)
        numbers = [value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, int)]
        if re.search(r"\d{7}", text) or ("*" in text and any(abs(number) > WIDTH for number in numbers)):
            raise TooMuch(f"a format has a width above {WIDTH:,}")
        characters, items = self._size(values)
        self._check_size(len(text) + characters * text.count("%"), items)

    def _size(self, value: Any) -> tuple[int, int]:
        """(characters, items) of a value, each counted as often as it is reached. TooMuch above TEXT and ITEMS."""
        if isinstance(value, (str, bytes)):
            return len(value), 0
        if isinstance(value, range):
            return 0, len(value)
        if not isinstance(value, HOLDERS):
            return 0, 0
        characters, items, left = 0, 0, [value]
        while left:
            each = left.pop()
            self.steps += 20  # many small ones take longer than their items
            parts = [*each, *each.values()] if isinstance(each, dict) else each
            kinds = set(map(type, parts))
            texts = tuple(kind for kind in kinds if issubclass(kind, (str, bytes)))
            characters += sum(len(part) for part in parts if isinstance(part, texts)) if texts else 0
            if holders := tuple(kind for kind in kinds if issubclass(kind, HOLDERS)):
                left += [part for part in parts if isinstance(part, holders)]
            items += len(parts)
            self._check_size(characters, items + len(left))
        return characters, items

    def _check_size(self, characters: int, items: int) -> None:
        self._require(characters <= TEXT, f"a text has more than {TEXT:,} characters")
        self._require(items <= ITEMS, f"a list has more than {ITEMS:,} items")

    def _add(self, characters: int, items: int) -> None:
        self.work += characters + ITEM * items
        most = WORK * self.share
        self._require(self.work <= most, f"it copies more than {most:,} characters")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise TooMuch(message)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{7}", format_spec):
            raise TooMuch(f"a format has a width above {WIDTH:,}")
        return super().format_field(value, format_spec)


class _Counted(NodeTransformer):
    """Counts the passes of loops and macros by the size of what they run, and makes of ``a ~ b`` the filter join."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        node = self._counted(node)
        if node.test is not None:
            node.iter = nodes.Call(nodes.EnvironmentAttribute("passes"), [node.iter], [], None, None)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._counted(node)

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
        if isinstance(node, nodes.Const):
            return node
        return nodes.Call(nodes.EnvironmentAttribute("measure"), [node], [], None, None, lineno=node.lineno)

    def _counted(self, node: Any) -> Any:
        cost = 10 + sum(1 for _ in node.find_all(nodes.Expr)) // 2
        cost += sum(len(text.data) for text in node.find_all(nodes.TemplateData)) // 10
        node = self.generic_visit(node)
        count = nodes.Call(nodes.EnvironmentAttribute("count"), [nodes.Const(cost)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node

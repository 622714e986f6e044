"""Jinja's sandbox for chat templates, which are code from a model's file: bounded in time and memory.

Every loop round, call and filter is a step, and so is every 64 characters, items or digits that an operation takes or
makes: a rendering has a number of steps. What would be large is refused before it is made.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from eldric.engine.errors import InvalidPrompt

MAX_STEPS = 1_000_000  # of one rendering; long chats with tools take some ten thousand
_PER_STEP = 64  # characters, items or digits
_MAX_SIZE = 1 << 24  # characters, items or digits of one result
_AT_ONCE = 1000  # pairs of digits of two numbers that are multiplied
_WIDENING = frozenset(("batch", "center", "indent", "round", "slice", "wordwrap"))  # filters with numbers for sizes
_WIDTH = re.compile(r"\d{6,}")  # in a format: no table is so wide

_steps: ContextVar[list[int]] = ContextVar("steps")  # how many are left to the rendering in progress


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """Whatever a template does, it does within this."""
    outer = _steps.set([MAX_STEPS])
    try:
        yield
    finally:
        _steps.reset(outer)


def step(count: int = 1) -> None:
    left = _steps.get()
    left[0] -= count
    if left[0] < 0:
        raise InvalidPrompt(f"the model's chat template takes more than {MAX_STEPS} steps")


def counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        step()
        yield item


def _take(size: int) -> None:
    """Something of that size is about to be made, or walked through."""
    if size > _MAX_SIZE:
        raise InvalidPrompt(f"the model's chat template makes something of {size} characters, items or digits")
    step(1 + size // _PER_STEP)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length() // 3
    return len(value) if isinstance(value, Sized) else 0


def together(values: list[Any]) -> str:
    """What `~` does."""
    texts = [str(value) for value in values]
    _take(sum(map(len, texts)))
    return "".join(texts)


class _Counting(NodeTransformer):
    """Has loops and `~` go by way of filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(values, "together", [], [], None, None, lineno=node.lineno)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. Filters must be given to `bound_filters` once all of them are there."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def bound_filters(self) -> None:
        self.globals.pop("lipsum", None)
        self.filters.update({name: _bounded(filter, name in _WIDENING) for name, filter in self.filters.items()})
        self.filters.update(counted=counted, together=together)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting().visit(source), *args, **kwargs)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        step()
        owner, values = getattr(obj, "__self__", None), [*args, *kwargs.values()]
        if isinstance(owner, str):
            _check_method(obj.__name__, owner, values)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            digits = _size(left) * abs(right) if isinstance(left, int) and isinstance(right, int) else 1
            _take(digits + digits**2 // _AT_ONCE)
        elif operator == "*":
            many = [value for value in (left, right) if isinstance(value, int)]
            sized = [value for value in (left, right) if not isinstance(value, int)]
            each_by_each = _size(left) * _size(right) // _AT_ONCE
            _take(max(0, many[0]) * _size(sized[0]) if many and sized else _size(left) + _size(right) + each_by_each)
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        else:
            _take(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


def _check_method(name: str, owner: str, values: list[Any]) -> None:
    """Before a string's method is called. A width is a number; `replace` and `join` make of two sizes a third."""
    texts = [value for value in values if isinstance(value, str)]
    grown = 0
    if name == "replace" and len(texts) >= 2:
        grown = (owner.count(texts[0]) if texts[0] else len(owner) + 1) * len(texts[1])
    elif name == "join" and values:
        parts: list[Any] = list(values[0]) if isinstance(values[0], list | tuple | str) else []
        grown = len(parts) * len(owner) + sum(map(_size, parts))
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        widths = [value for value in values if isinstance(value, int)]
        grown = max([0, *widths]) * (owner.count("\t") if name == "expandtabs" else 1)
    _take(len(owner) + grown)


def _check_format(layout: str, values: Iterable[Any]) -> None:
    if _WIDTH.search(layout) or any(isinstance(value, int) and _size(value) > 18 for value in values):
        raise InvalidPrompt("the model's chat template formats something beyond all use")
    if "*" in layout or "{:{" in layout.replace(" ", ""):  # widths that are values
        _take(sum(abs(value) for value in values if isinstance(value, int)))
    _take(len(layout) + sum(map(_size, values)))


def _bounded(filter: Callable[..., Any], widens: bool) -> Callable[..., Any]:
    """A filter that takes steps for what it walks through, and for what it makes. widens: as far as its numbers say."""
    place = 1 if hasattr(filter, "jinja_pass_arg") else 0  # of the value, behind what Jinja passes

    @functools.wraps(filter)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if len(given) > place:
            if isinstance(given[place], Iterator):
                given[place] = counted(given[place])
            _take(_size(given[place]))
        for value in (*given[place + 1 :], *kwargs.values()):
            if widens and isinstance(value, int):
                _take(max(0, value))
        made = filter(*given, **kwargs)
        if isinstance(made, str | list):
            _take(len(made))
        return made

    return bounded

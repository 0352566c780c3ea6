"""Replacement values that can be turned into a pass-through after they were installed.

Once somebody else has wrapped our wrapper, it can no longer be taken out of the chain without dropping theirs. Turning
it off in place can always be done.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

_ROUTE = "__trl_turbo_route__"
_PARTS = ("fget", "fset", "fdel")
# Bounds the search of reaches(): foreign wrappers are a few layers, never a graph.
_MAX_VISITED = 256


class Route:
    """Where calls of one installed wrapper go: to the replacement while on, to the original while off."""

    __slots__ = ("original", "target")

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.target = original


class Switchable:
    """A function, static method, class method or property whose behaviour can be switched in place.

    Args:
        original: The raw value as it stands in ``vars(owner)``.

    Attributes:
        installed: The raw value to put in its place, of the same kind and with the same signature. Off at first.
    """

    def __init__(self, original: Any) -> None:
        self._kind = type(original)
        if self._kind is property:
            functions = {part: getattr(original, part) for part in _PARTS}
        elif self._kind is FunctionType:
            functions = {"": original}
        else:
            functions = {"": original.__func__}
        self._routes = {part: Route(f if f is not None else _absent(part)) for part, f in functions.items()}
        wrappers = {part: _wrapper(route) for part, route in self._routes.items()}
        self._wrappers = tuple(wrappers.values())
        self.installed: Any
        if self._kind is property:
            fget, fset, fdel = self._wrappers
            self.installed = property(fget, fset, fdel, original.__doc__)
        elif self._kind is FunctionType:
            self.installed = wrappers[""]
        else:
            self.installed = self._kind(wrappers[""])

    @staticmethod
    def fits(original: Any) -> bool:
        """Whether a raw value is of a kind that can be switched."""
        if type(original) in (staticmethod, classmethod):
            return isinstance(original.__func__, FunctionType)
        return type(original) in (FunctionType, property)

    def check(self, replacement: Any) -> None:
        """Raise ``TypeError`` where ``replacement`` cannot stand for the original."""
        self._functions(replacement)

    def on(self, replacement: Any) -> None:
        """Send calls to ``replacement``: the same kind of raw value, or the bare function below it.

        Raises:
            TypeError: It is of another kind, or cannot be called.
        """
        for part, function in self._functions(replacement).items():
            self._routes[part].target = function

    def off(self) -> None:
        """Send calls to the original."""
        for route in self._routes.values():
            route.target = route.original

    def _functions(self, replacement: Any) -> dict[str, Callable[..., Any]]:
        if self._kind is property:
            if not isinstance(replacement, property):
                raise TypeError(f"a property was replaced by {replacement!r}; return a property from wrap")
            parts = {part: getattr(replacement, part) for part in _PARTS}
            return {part: f if f is not None else _absent(part) for part, f in parts.items()}
        if isinstance(replacement, (staticmethod, classmethod)):
            if type(replacement) is not self._kind:
                raise TypeError(
                    f"a {_kind_name(self._kind)} was replaced by a {type(replacement).__name__}; "
                    "return the same kind, or a bare function, from wrap"
                )
            replacement = replacement.__func__
        if not callable(replacement):
            raise TypeError(f"a {_kind_name(self._kind)} was replaced by {replacement!r}, which cannot be called")
        return {"": replacement}

    def reached_from(self, value: Any, namespace: dict[str, Any]) -> bool:
        """Whether ``value``, a wrapper that somebody else installed over ours, visibly refers to ours.

        Looks through ``__wrapped__``, descriptors, partials, closures, defaults and the globals (or names in
        ``namespace``, the owner's) that a function mentions.
        """
        ours = {id(self.installed), *map(id, self._wrappers)}
        queue, seen = [value], {id(value)}
        while queue and len(seen) < _MAX_VISITED:
            here = queue.pop(0)
            if id(here) in ours:
                return True
            for there in _referred(here, namespace):
                if id(there) not in seen:
                    seen.add(id(there))
                    queue.append(there)
        return False


def replacement_of(function: Any) -> Callable[..., Any] | None:
    """Return what an installed wrapper, or a method bound to it, calls now; ``None`` while it is off or is not ours."""
    route = getattr(getattr(function, "__func__", function), "__dict__", {}).get(_ROUTE)
    if route is None or route.target is route.original:
        return None
    target: Callable[..., Any] = route.target
    return target


def as_written(function: Any) -> Any:
    """Return the function below all wrappers, ours and those that carry ``__wrapped__``: what its author wrote."""
    while True:
        route = getattr(function, "__dict__", {}).get(_ROUTE)
        inner = route.original if route is not None else getattr(function, "__wrapped__", None)
        if inner is None:
            return function
        function = inner


def _kind_name(kind: type) -> str:
    return "plain function" if kind is FunctionType else kind.__name__


def _absent(part: str) -> Callable[..., Any]:
    verb = {"fget": "read", "fset": "set", "fdel": "deleted"}[part]

    def raise_absent(instance: Any, *_: Any) -> Any:
        raise AttributeError(f"this property of {type(instance).__name__!r} object cannot be {verb}")

    return raise_absent


def _wrapper(route: Route) -> FunctionType:
    original = route.original
    if inspect.iscoroutinefunction(original):

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return await route.target(*args, **kwargs)

        template: Any = call_async
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return route.target(*args, **kwargs)

        template = call
    # The original's globals, so that typing.get_type_hints resolves its annotations where they were written.
    namespace = getattr(original, "__globals__", template.__globals__)
    wrapper = FunctionType(template.__code__, namespace, template.__name__, None, template.__closure__)
    functools.update_wrapper(wrapper, original)
    # Accelerate's extract_model_from_parallel(keep_fp32_wrapper=False) follows __wrapped__ from an instance's forward
    # down to the bottom and installs that on the instance: a class-level forward of ours that carried __wrapped__ would
    # be dropped there (accelerate 1.x, utils/other.py). The signature is kept without it.
    wrapper.__dict__.pop("__wrapped__", None)
    wrapper.__dict__[_ROUTE] = route
    signature = _signature(original)
    if signature is not None:
        wrapper.__signature__ = signature  # type: ignore[attr-defined]
    return wrapper


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    options: dict[str, Any] = {}
    if sys.version_info >= (3, 14):
        # Annotations are evaluated late from 3.14 on, and a name imported for type checkers only would raise here.
        import annotationlib

        options["annotation_format"] = annotationlib.Format.FORWARDREF
    try:
        return inspect.signature(function, **options)
    except (TypeError, ValueError):
        return None


def _referred(value: Any, namespace: dict[str, Any]) -> Iterator[Any]:
    if isinstance(value, property):
        yield from (value.fget, value.fset, value.fdel)
    elif isinstance(value, functools.partial):
        yield value.func
        yield from value.args
    for name in ("__func__", "__wrapped__"):
        if (inner := inspect.getattr_static(value, name, None)) is not None:
            # __func__ of a method is a descriptor of its type: the plain attribute gives the function.
            yield getattr(value, name, None) if name == "__func__" else inner
    if not isinstance(value, FunctionType):
        return
    yield from (_content(cell) for cell in value.__closure__ or ())
    yield from value.__defaults__ or ()
    yield from (value.__kwdefaults__ or {}).values()
    for name in value.__code__.co_names:
        for scope in (value.__globals__, namespace):
            if name in scope:
                yield scope[name]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None

"""Surgeries that a user hands over as objects: their own functions, and what a plugin adopts."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any

from torchweld.components import Component
from torchweld.identity import identity, qualified_name


@dataclass(frozen=True)
class Given:
    """Stands for the options of an object that was given ready made, in plan and digest."""

    given: str  # the object as text, without memory addresses


@dataclass(frozen=True)
class Adopted:
    """Builds an adopted object whose component names no options of its own."""

    build: Any

    def __call__(self, given: str) -> Any:
        """Build it; ``given`` is for the digest only."""
        return self.build()


def from_object(obj: object) -> Component | None:
    """Wrap a function of ``Parts``, or an object with ``apply``; None for anything else.

    The name is the qualified name. An object or a partial enters the digest by its text too.
    """
    if inspect.isclass(obj) or not _takes_parts(obj):
        return None
    function = obj.func if isinstance(obj, functools.partial) else obj
    component = Component(
        name=qualified_name(function),
        summary="your own surgery",
        build=lambda: obj,
    )
    return component if inspect.isroutine(obj) else remember(component)


def remember(component: Component) -> Component:
    """Let the object itself enter plan and digest, where its component has no options for it."""
    if component.options is not None or isinstance(component.build, str):
        return component
    return replace(component, options=Given, build=Adopted(component.build))


def given_options(component: Component, obj: object) -> dict[str, object]:
    """Return the options that stand for ``obj``, where ``remember`` made room for them."""
    return {"given": identity(obj)} if component.options is Given else {}


def _takes_parts(obj: object) -> bool:
    """Whether ``obj``, or its ``apply``, can be called with one argument.

    The algorithm of another library, without the plugin that adopts it, has an ``apply`` of more.
    """
    call = getattr(obj, "apply", obj)
    if not callable(call):
        return False
    try:
        inspect.signature(call).bind(None)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True

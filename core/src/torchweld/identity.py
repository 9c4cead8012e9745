"""What an option is, as text that is the same in every process: the material of the digest."""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from torchweld.guard import attempt

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_MAX_DEPTH = 6


def identity(value: object, depth: int = 0) -> str:
    """Describe ``value`` without memory addresses and without the order of sets and mappings.

    Functions and classes are named by module and qualified name. An object whose ``repr`` is the
    default one (a class name and an address) is described by its simple attributes instead.

    >>> identity({"b": 1, "a": [None, 2.5]})
    "{'a': [None, 2.5], 'b': 1}"
    """
    if isinstance(value, enum.Enum):
        return f"{qualified_name(type(value))}.{value.name}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, PurePath):
        return repr(str(value))
    if depth > _MAX_DEPTH:  # an object that contains itself
        return f"{qualified_name(type(value))}(...)"
    return _container(value, depth + 1)


def qualified_name(value: object) -> str:
    """Module and qualified name of a class or function; of anything else that of its type."""
    name = getattr(value, "__qualname__", None)
    if not isinstance(name, str):
        return qualified_name(type(value))
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) and module != "builtins" else name


def _container(value: object, depth: int) -> str:
    if isinstance(value, functools.partial):
        inner = (value.args, value.keywords)
        return f"partial({identity(value.func, depth)}, {identity(inner, depth)})"
    if isinstance(value, Mapping):
        pairs = sorted((identity(k, depth), identity(v, depth)) for k, v in value.items())
        return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
    if isinstance(value, AbstractSet):
        return "{" + ", ".join(sorted(identity(item, depth) for item in value)) + "}"
    if isinstance(value, Sequence) and not isinstance(value, range):
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        return opening + ", ".join(identity(item, depth) for item in value) + closing
    return _object(value, depth)


def _object(value: Any, depth: int) -> str:
    if isinstance(getattr(value, "__qualname__", None), str):
        return qualified_name(value)
    if is_dataclass(value):
        return _with_attributes(value, [f.name for f in fields(value)], depth)
    written: Any = type(value).__repr__
    if written is object.__repr__:
        plain = (*_PLAIN, tuple, list, enum.Enum)
        attributes = getattr(value, "__dict__", {})
        # Private ones change while the object is used; processes would then seem to disagree.
        public = [name for name in sorted(attributes) if not name.startswith("_")]
        simple = [name for name in public if isinstance(attributes[name], plain)]
        return _with_attributes(value, simple, depth)
    text = attempt(lambda: repr(value)).value or ""
    return f"{qualified_name(type(value))}: {_ADDRESS.sub('', text)}"


def _with_attributes(value: object, names: Sequence[str], depth: int) -> str:
    inside = ", ".join(f"{name}={identity(getattr(value, name), depth)}" for name in names)
    return f"{qualified_name(type(value))}({inside})"

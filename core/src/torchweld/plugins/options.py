"""From what a user wrote to the options dataclass of a component; every mistake is a TW103."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from typing import Any, Literal, Union, cast, get_args, get_origin

from torchweld.guard import attempt, one_line
from torchweld.problems import Problem
from torchweld.spelling import did_you_mean

_UNIONS: tuple[object, ...] = (Union, types.UnionType)


_MISFIT = object()
"""Stands for a value that is not of the annotated type."""


def build_options(
    name: str, options: type | None, given: Mapping[str, object]
) -> tuple[Any, list[Problem]]:
    """Make an instance of ``options`` from what was ``given``.

    Wrong options are left out of the instance, so that the rest of the plan can still be checked.

    Args:
        name: of the component, for the messages.
        options: its frozen dataclass, or None when it has no options.
        given: the user's options by name.

    Returns:
        The instance, or None where there are no options or it cannot be made; and the problems.
    """
    if options is None:
        return None, [_no_options(name, key) for key in sorted(map(str, given))]
    known = {field.name: field for field in fields(options) if field.init}
    hints = _hints(options)
    problems = [_unknown(name, key, known) for key in sorted(map(str, set(given) - set(known)))]
    values: dict[str, object] = {}
    for key in known.keys() & given.keys():
        value = _convert(given[key], hints.get(key, Any))
        if value is _MISFIT:
            problems.append(_mistyped(name, key, given[key], hints[key]))
        else:
            values[key] = value
    missing = [key for key, f in known.items() if key not in given and _is_required(f)]
    problems += [_missing(name, key) for key in missing]
    problems.sort(key=lambda problem: problem.what)
    return _instance(name, options, values, problems)


def expand_preset(
    presets: Mapping[str, Mapping[str, object]], name: str, given: Mapping[str, object]
) -> dict[str, object]:
    """Return the options that the familiar ``name`` stands for; what the user gave wins."""
    return {**presets.get(name, {}), **given}


def describe_type(annotation: object) -> str:
    """Return an annotation as a user reads it: ``int or None``, ``'norm' or 'value'``."""
    if annotation is None or annotation is type(None):
        return "None"
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) in _UNIONS:
        return " or ".join(describe_type(choice) for choice in get_args(annotation))
    if inspect.isclass(annotation) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def option_rows(options: type | None) -> list[tuple[str, str, str]]:
    """Return (name, type, default) of every option, in the order of the dataclass."""
    if options is None:
        return []
    hints = _hints(options)
    return [
        (field.name, describe_type(hints.get(field.name, field.type)), _default_text(field))
        for field in fields(options)
        if field.init
    ]


def _convert(value: object, annotation: object) -> object:
    """Return ``value`` in the annotated type, or ``_MISFIT``.

    ``1`` becomes ``1.0`` for a float and a list a tuple, so that two spellings of one option have
    one digest. Annotations other than the simple ones are not checked.
    """
    origin = get_origin(annotation) or annotation
    if origin in _UNIONS:
        return _convert_union(value, get_args(annotation))
    if origin is Literal:
        return _convert_literal(value, get_args(annotation))
    if annotation is None or annotation is type(None):
        return _checked(value, value is None)
    if origin is tuple:
        return _convert_tuple(value, get_args(annotation))
    simple = _SIMPLE.get(cast("Any", origin)) if inspect.isclass(origin) else None
    return simple(value) if simple else value


def _convert_union(value: object, choices: Sequence[object]) -> object:
    exact = [choice for choice in choices if type(value) is choice]
    converted = (_convert(value, choice) for choice in (*exact, *choices))
    return next((item for item in converted if item is not _MISFIT), _MISFIT)


def _convert_literal(value: object, choices: Sequence[object]) -> object:
    # 1 == True and 1 == 1.0, but neither is the choice that was written down.
    same = [choice for choice in choices if choice == value and type(choice) is type(value)]
    return _checked(value, bool(same))


def _convert_tuple(value: object, items: Sequence[object]) -> object:
    if not isinstance(value, (list, tuple)):
        return _MISFIT
    kinds = list(items) if items else [Any, ...]
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        return _MISFIT
    converted = tuple(_convert(item, kind) for item, kind in zip(value, kinds, strict=True))
    return _MISFIT if any(item is _MISFIT for item in converted) else converted


def _checked(value: object, holds: bool) -> object:
    return value if holds else _MISFIT


def _integer(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return _MISFIT
    return int(value)


def _real(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, Real):
        return _MISFIT
    return float(value)


_SIMPLE: Mapping[type, Callable[[object], object]] = {
    int: _integer,
    float: _real,
    bool: lambda value: _checked(value, isinstance(value, bool)),
    str: lambda value: _checked(value, isinstance(value, str)),
}


def _hints(options: type) -> dict[str, Any]:
    """Resolve the annotations; one that needs a module imported for types only is not checked."""
    whole = attempt(typing.get_type_hints, options)
    if whole.error is None:
        return whole.value or {}
    scope = vars(sys.modules.get(options.__module__, typing))
    resolved: dict[str, Any] = {}
    for field in fields(options):
        alone = types.SimpleNamespace(__annotations__={field.name: field.type})
        one = attempt(typing.get_type_hints, alone, dict(scope))
        resolved[field.name] = (one.value or {}).get(field.name, Any)
    return resolved


def _instance(
    name: str, options: type, values: dict[str, object], problems: list[Problem]
) -> tuple[Any, list[Problem]]:
    """Call the dataclass; its own checks become a problem."""
    made = attempt(options, **values)
    if made.error is None:
        return made.value, problems
    if not problems:  # otherwise it fails for want of what is reported already
        problems = [_refused(name, made.error)]
    bare = attempt(options)
    return bare.value, problems


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _default_text(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return repr(field.default)
    if field.default_factory is not MISSING:
        made = attempt(field.default_factory)
        return repr(made.value) if made.error is None else "(computed)"
    return ""


def _problem(name: str, what: str, why: str = "", fix: str = "") -> Problem:
    return Problem("TW103", "error", what, why=why, fix=fix, who=(name,))


def _no_options(name: str, key: str) -> Problem:
    return _problem(name, f"{name} has no option {key!r}", "it has no options at all")


def _unknown(name: str, key: str, known: Mapping[str, Field[Any]]) -> Problem:
    listed = f"its options: {', '.join(known)}" if known else "it has no options at all"
    return _problem(name, f"{name} has no option {key!r}", listed, did_you_mean(key, known))


def _missing(name: str, key: str) -> Problem:
    return _problem(name, f"{name} needs its option {key!r}", "it has no default", f"give {key}=…")


def _mistyped(name: str, key: str, value: object, annotation: object) -> Problem:
    shown = one_line_repr(value)
    what = f"{name} cannot take {key}={shown}"
    expected, kind = describe_type(annotation), type(value).__name__
    told = get_origin(annotation) is Literal  # then its values say it better than their type
    return _problem(name, what, f"{key} is {expected}{'' if told else f', not {kind}'}")


def _refused(name: str, error: BaseException) -> Problem:
    expected = isinstance(error, (ValueError, TypeError))
    text = str(error) if expected and str(error) else one_line(error)
    return _problem(name, f"{name} refuses its options", " ".join(text.split()))


def one_line_repr(value: object) -> str:
    """Return the ``repr`` of a value in one line of at most 80 characters."""
    shown = attempt(lambda: " ".join(repr(value).split()))
    text = shown.value if isinstance(shown.value, str) else f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:79] + "…"

"""The grammar of choices on the command line.

``surgery=blurpool,cutmix:alpha=0.5`` names components by comma and options by colon. Values are
TOML literals; a bare word is a string, and quotes protect commas, colons and digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torchweld.components import CheckpointingOptions, Choice, CompileOptions, Settings, Use
from torchweld.errors import InvalidArgument
from torchweld.planning import per_unit
from torchweld.plugins.options import build_options
from torchweld.spelling import did_you_mean

_ARGUMENTS = ("strategy", "data", "val_data", "surgery")
_SETTINGS = tuple(f.name for f in fields(Settings))
_INTEGER = re.compile(r"[+-]?(0|[1-9](_?\d)*)")
_FLOAT = re.compile(r"[+-]?((0|[1-9](_?\d)*)(\.\d(_?\d)*)?([eE][+-]?\d+)?|inf|nan)")
_PER_UNIT: Mapping[str, type] = {
    "compile": CompileOptions,
    "activation_checkpointing": CheckpointingOptions,
}
_BRACKETS = {"[": "]", "{": "}"}

LONG_PRECISIONS: Mapping[str, str] = {
    "32-true": "32",
    "bf16-mixed": "bf16",
    "16-mixed": "16",
}
"""Lightning's long forms, and what they are called here."""


@dataclass(frozen=True)
class Asked:
    """The words of ``torchweld plan``, read."""

    strategy: Sequence[Choice] = ()
    data: Sequence[Choice] = ()
    val_data: Sequence[Choice] = ()
    surgery: Sequence[Choice] = ()
    settings: Settings = field(default_factory=Settings)


def read_words(words: Sequence[str]) -> Asked:
    """Read ``key=value`` words: the four arguments that name components, and settings.

    Raises:
        InvalidArgument: a word does not fit the grammar, or its key is unknown.
    """
    choices: dict[str, list[Choice]] = {name: [] for name in _ARGUMENTS}
    settings: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key in choices and equals:
            choices[key] += read_choices(value)
        elif key in _SETTINGS and equals:
            settings[key] = read_value(value)
        else:
            raise InvalidArgument(_unknown_word(word, key, equals))
    return Asked(**choices, settings=read_settings(settings))


def read_settings(given: Mapping[str, object]) -> Settings:
    """Make settings of words, Lightning's long forms of ``precision`` included.

    Raises:
        InvalidArgument: a value is not one that the setting can have.
    """
    values = dict(given)
    if "precision" in values:
        precision = str(values["precision"])
        values["precision"] = LONG_PRECISIONS.get(precision, precision)
    for name, options in _PER_UNIT.items():
        values[name] = per_unit(name, options, values.get(name))
    settings, problems = build_options("torchweld plan", Settings, values)
    if problems:
        raise InvalidArgument("; ".join(f"{p.what}: {p.why}" for p in problems))
    assert isinstance(settings, Settings), "without problems there is an instance"
    return settings


def read_choices(text: str) -> list[Choice]:
    """Read ``name:key=value,name``.

    Raises:
        InvalidArgument: an option without ``=``, an empty name, a quote that stays open.
    """
    return [_read_choice(part) for part in split(text, ",")]


def read_value(text: str) -> object:
    """Read a TOML literal; a bare word is a string.

    >>> read_value("0.5"), read_value("true"), read_value("[1, 2]"), read_value("bf16")
    (0.5, True, [1, 2], 'bf16')

    Raises:
        InvalidArgument: nothing, or a quote or bracket that stays open.
    """
    text = text.strip()
    for matches, read in _LITERALS:
        if matches(text):
            return read(text)
    return text


def split(text: str, separator: str) -> list[str]:
    """Split at ``separator`` outside quotes and brackets.

    >>> split("a:names=['x,y'],b", ",")
    ["a:names=['x,y']", 'b']

    Raises:
        InvalidArgument: a quote or bracket stays open.
    """
    parts, start, open_signs = [], 0, ""
    for place, sign in enumerate(text):
        if open_signs and sign == open_signs[-1]:
            open_signs = open_signs[:-1]
        elif open_signs and open_signs[-1] in "'\"":
            continue
        elif sign in "'\"" or sign in _BRACKETS:
            open_signs += _BRACKETS.get(sign, sign)
        elif sign == separator and not open_signs:
            parts.append(text[start:place])
            start = place + 1
    if open_signs:
        raise InvalidArgument(f"in {text!r} a {open_signs[-1]} is missing")
    return [*parts, text[start:]]


def _read_choice(text: str) -> Choice:
    name, *options = split(text, ":")
    name = name.strip().strip("'\"")
    if not name:
        raise InvalidArgument(f"{text!r} names no component; write name or name:option=value")
    pairs = [_read_option(option, name) for option in options]
    return Use(name, dict(pairs)) if pairs else name


def _read_option(text: str, name: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InvalidArgument(f"{name}:{text} has no value; write {name}:{key or 'option'}=value")
    return key.strip(), read_value(value)


def _read_string(text: str) -> str:
    if text[0] == "'":
        return text[1:-1]
    try:
        return str(json.loads(text))
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{text} is no string: {error.msg}") from None


def _read_list(text: str) -> list[object]:
    inside = text[1:-1].strip().removesuffix(",")
    return [read_value(item) for item in split(inside, ",")] if inside else []


def _refuse(text: str) -> object:
    if not text:
        raise InvalidArgument("a value is missing after '='; write '' for an empty string")
    raise InvalidArgument(f"{text} is no value; quote it to mean a string: '{text}'")


def _is_string(text: str) -> bool:
    return len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]


_LITERALS: tuple[tuple[Callable[[str], Any], Callable[[str], object]], ...] = (
    (lambda text: text in {"true", "false"}, lambda text: text == "true"),
    (_INTEGER.fullmatch, lambda text: int(text.replace("_", ""))),
    (_FLOAT.fullmatch, lambda text: float(text.replace("_", ""))),
    (_is_string, _read_string),
    (lambda text: text.startswith("[") and text.endswith("]"), _read_list),
    (lambda text: not text or text[0] in "[{'\"", _refuse),
)
"""What a literal looks like, and how it is read; the first that matches."""


def _unknown_word(word: str, key: str, equals: str) -> str:
    known = (*_ARGUMENTS, *_SETTINGS)
    if not equals:
        return f"{word!r} is no key=value word; the keys are {', '.join(known)}"
    meant = did_you_mean(key, known) or f"the keys are {', '.join(known)}"
    return f"there is no argument {key!r}; {meant}"

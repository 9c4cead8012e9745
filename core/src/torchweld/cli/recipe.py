"""A recipe: one TOML file that is one run. Read here into plain data; nothing is imported.

A recipe is the two calls of a script: at the top are the arguments of ``fit``, in the table
``[trainer]`` those of ``Trainer``. An object is ``"module:object"``, ``"file.py:object"`` beside
the recipe, or a name that torch has; ``{use = "…", key = value}`` gives it arguments, of which any
may be such a table again.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchweld.cli.choices import read_choices, read_value
from torchweld.components import Choice, Use
from torchweld.errors import InvalidArgument
from torchweld.spelling import did_you_mean

OBJECTS = ("model", "loss", "step", "eval_step", "optimizer", "lr_scheduler", "param_groups")
DATA = ("train", "val", "datasets")
SEVERAL = ("val", "metrics")
"""Of these there may be several, in a table of names."""
PLAIN: Mapping[str, type] = {"init_weights": str, "ckpt_path": str, "hparams": dict, "export": str}
KEYS = (*OBJECTS, *DATA, "metrics", *PLAIN, "trainer")
CHOICES = ("strategy", "data", "val_data", "surgery")
"""Arguments of ``Trainer`` that name components."""


@dataclass(frozen=True)
class Named:
    """An object that the recipe names.

    Attributes:
        where: its place in the recipe, for messages: ``"optimizer"``, ``"metrics.accuracy"``.
        path: ``"module:object"``, ``"file.py:object"``, or a name.
        arguments: what it is given.
    """

    where: str
    path: str
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What a recipe says.

    Attributes:
        folder: where files that it names are looked for.
        fit: arguments of ``fit`` by name; objects are :class:`Named`, one or a mapping of several.
        trainer: arguments of ``Trainer``; components are choices, callbacks and loggers named; in a
            choice, what is no plain value is :class:`Named`.
        export: where the trained weights are written; empty for nowhere.
    """

    folder: Path
    fit: Mapping[str, Any]
    trainer: Mapping[str, Any]
    export: str = ""


def open_recipe(path: Path, words: Sequence[str] = ()) -> Recipe:
    """Read the file ``path``, with ``words`` of ``--set`` over it.

    Raises:
        InvalidArgument: every mistake, not only the first.
    """
    # In the standard library from Python 3.11 on; the package before it reads the same.
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        data = toml.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise InvalidArgument(f"{path} is no TOML: {error}") from error
    for word in words:
        data = with_word(data, word)
    try:
        return read_recipe(data, path.parent)
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error}") from None


def with_word(data: Mapping[str, Any], word: str) -> dict[str, Any]:
    """Return ``data`` with one value replaced.

    >>> with_word({"optimizer": "sgd"}, "optimizer.lr=0.1")
    {'optimizer': {'use': 'sgd', 'lr': 0.1}}

    Raises:
        InvalidArgument: it is no ``key=value``, or leads through something that is no table.
    """
    key, equals, value = word.partition("=")
    if not equals or not key.strip():
        raise InvalidArgument(f"--set {word}: write key=value, e.g. --set trainer.max_epochs=3")
    return _replaced(data, key.strip().split("."), read_value(value), word)


def _replaced(data: Any, keys: list[str], value: object, word: str) -> dict[str, Any]:
    table = {"use": data} if isinstance(data, str) else data
    if not isinstance(table, Mapping):
        raise InvalidArgument(
            f"--set {word}: {keys[0]!r} is looked for in {data!r}, which is no table; set the "
            "whole value"
        )
    if len(keys) == 1:
        return {**table, keys[0]: value}
    return {**table, keys[0]: _replaced(table.get(keys[0], {}), keys[1:], value, word)}


def read_recipe(data: Mapping[str, Any], folder: Path) -> Recipe:
    """Read the content of a recipe.

    Raises:
        InvalidArgument: every mistake, not only the first.
    """
    problems = [*_unknown_keys(data), *_contradictions(data)]
    fit: dict[str, Any] = {}
    for key in (*OBJECTS, *DATA, "metrics"):
        if key in data:
            fit[key] = _objects(key, data[key], problems)
    for key, kind in PLAIN.items():
        if key in data and not isinstance(data[key], kind):
            shown = "a table" if kind is dict else "a text"
            problems.append(f"{key} = {data[key]!r}: give {shown}")
        elif key in data:
            fit[key] = data[key]
    trainer = _trainer(data.get("trainer", {}), problems)
    if problems:
        raise InvalidArgument("\n  - ".join(["it cannot be used:", *problems]))
    return Recipe(folder, fit, trainer, fit.pop("export", ""))


def _unknown_keys(data: Mapping[str, Any]) -> list[str]:
    return [f"there is no key {key!r}: {_meant(key)}" for key in data if key not in KEYS]


def _meant(key: str) -> str:
    near = did_you_mean(key, KEYS)
    if near and key not in CHOICES:
        return near
    listed = near or "the keys are " + ", ".join(KEYS)
    return f"{listed} (arguments of Trainer belong into the table [trainer])"


def _contradictions(data: Mapping[str, Any]) -> list[str]:
    found = [f"{key} is missing" for key in ("model", "optimizer") if key not in data]
    if "datasets" in data and ("train" in data or "val" in data):
        found.append("datasets gives train and val: leave those out")
    if "datasets" not in data and "train" not in data:
        found.append("train is missing (or datasets, a function that returns train and val)")
    return found


def _objects(key: str, value: Any, problems: list[str]) -> Any:
    """One named object; of validation sets and metrics several, in a table without ``use``."""
    several = isinstance(value, Mapping) and "use" not in value and key in SEVERAL
    if several:
        return {name: _named(f"{key}.{name}", one, problems) for name, one in value.items()}
    if key == "metrics":
        problems.append('metrics has no names: write metrics.accuracy = "module:object"')
    return _named(key, value, problems)


def _named(where: str, value: Any, problems: list[str]) -> Named:
    if isinstance(value, str):
        return Named(where, value)
    if isinstance(value, Mapping) and isinstance(value.get("use"), str):
        return Named(where, value["use"], _arguments(where, value, problems))
    problems.append(
        f'{where} = {value!r} names no object: write {where} = "module:object", or a table with '
        "use and arguments"
    )
    return Named(where, "")


def _arguments(where: str, table: Mapping[str, Any], problems: list[str]) -> dict[str, object]:
    """What is beside ``use``; a value that has a ``use`` itself is an object too."""
    return {
        key: _named(f"{where}.{key}", value, problems)
        if isinstance(value, Mapping) and "use" in value
        else value
        for key, value in table.items()
        if key != "use"
    }


# ---- [trainer] -----------------------------------------------------------------------------------


def _trainer(table: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        problems.append(f"trainer = {table!r}: write a table, [trainer]")
        return {}
    found = dict(table)
    for key in CHOICES:
        if key in found:
            found[key] = _choices(key, found[key], problems)
    for key in ("callbacks", "logger"):
        if key in found and not isinstance(found[key], bool):
            several = found[key] if isinstance(found[key], list) else [found[key]]
            found[key] = [
                _named(f"trainer.{key}[{i}]", one, problems) for i, one in enumerate(several)
            ]
    return found


def _choices(key: str, value: Any, problems: list[str]) -> Any:
    """Components: a text as on the command line, a table, or a list of these."""
    found: list[Choice] = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            found += _worded(key, one, problems)
        elif isinstance(one, Mapping) and isinstance(one.get("use"), str):
            where, name = f"trainer.{key}", one["use"]
            chosen = Named(where, name) if ":" in name else name
            found.append(Use(chosen, _arguments(where, one, problems)))
        else:
            problems.append(
                f'trainer.{key} = {one!r} names no component: write "name", or a table with use '
                "and options"
            )
    return found[0] if len(found) == 1 and key != "surgery" else found


def _worded(key: str, text: str, problems: list[str]) -> list[Choice]:
    try:
        return read_choices(text)
    except InvalidArgument as error:
        problems.append(f"trainer.{key}: {error}")
        return []

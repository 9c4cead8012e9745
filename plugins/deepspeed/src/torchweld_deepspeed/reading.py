"""A user's own DeepSpeed configuration, read as it is: a JSON file with comments, or a mapping."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchweld.plugins.options import one_line_repr

_TOKEN = re.compile(
    r'(?P<text>"(?:\\.|[^"\\\n])*")'
    r"|(?P<comment>//[^\n]*|\#[^\n]*|/\*.*?\*/)"
    r"|(?P<comma>,)(?=(?:\s|//[^\n]*|\#[^\n]*|/\*.*?\*/)*[}\]])",
    re.DOTALL,
)
"""What is not plain JSON between the texts: comments, and a comma before a closing bracket."""


class Configuration(Mapping[str, Any]):
    """A DeepSpeed configuration as it was written; compared and digested by its content.

    Attributes:
        source: how messages name it: the file, or ``"config"``.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self.source = values, source

    def __getitem__(self, key: str) -> Any:
        """The value of an outermost key."""
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        """The outermost keys."""
        return iter(self._values)

    def __len__(self) -> int:
        """The number of outermost keys."""
        return len(self._values)

    def __repr__(self) -> str:
        """The content, as a mapping prints."""
        return repr(self._values)

    def at(self, path: str) -> Any:
        """The value at ``"zero_optimization.stage"``; None where there is none or it is "auto"."""
        value: Any = self._values
        if path.startswith("bf16.") and "bf16" not in value:
            path = f"bfloat16.{path.removeprefix('bf16.')}"  # its old name
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return None if value == "auto" else value


def read_config(given: object) -> Configuration | None:
    """Read a configuration from the path of a file, or take a mapping.

    Raises:
        ValueError: there is no such file, or it is not what DeepSpeed could read; says where.
        TypeError: ``given`` is neither a path nor a mapping.
    """
    if given is None or isinstance(given, Configuration):
        return given
    if isinstance(given, Mapping):
        return Configuration(_plain(given, "config"), "config")
    if isinstance(given, (str, os.PathLike)):
        return _read_file(Path(given))
    raise TypeError(
        f"config={given!r} is a {type(given).__name__}: give the path of a JSON file, or a mapping"
    )


def shown(value: object) -> str:
    """A value as a configuration has it, in one line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else one_line_repr(value)


def _read_file(path: Path) -> Configuration:
    source = f"'{path}'"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"config={source} is not UTF-8 (byte {error.start}): save it as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"config={one_line_repr(str(path))} cannot be read ({reason}): "
            "give the path of a JSON file, or a mapping"
        ) from error
    return Configuration(_parse(text, source), source)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(_TOKEN.sub(_blank, text), object_pairs_hook=_unique)
    except _DuplicateKey as error:
        raise ValueError(f"config={source} has the key {error} twice: keep one of them") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(
            f"config={source} is not JSON ({error.msg}, {place}): "
            "comments and commas before a bracket are accepted, keys and texts need their quotes"
        ) from error
    except RecursionError as error:
        raise ValueError(f"config={source} is nested too deeply: it is no configuration") from error
    if not isinstance(values, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not the argument
            f"config={source} holds a {type(values).__name__}: a configuration is a table of keys"
        )
    return values


class _DuplicateKey(ValueError):
    """One key stands twice in one table."""


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKey(repr(key))
        values[key] = value
    return values


def _blank(match: re.Match[str]) -> str:
    """Keep a text, and of everything else the lines, so that places in messages stay right."""
    return match[0] if match["text"] is not None else re.sub(r"[^\n]", " ", match[0])


def _plain(value: Any, path: str) -> Any:
    """Copy a mapping into dictionaries, lists and single values, as JSON would have them."""
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise ValueError(f"{path} has the key {wrong!r}: keys are texts")
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, path) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value

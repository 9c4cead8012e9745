"""The one place where code of strangers is called: what it raises becomes data."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST_LINE = 240


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What a call of a plugin's code came to: ``error`` is None exactly when it returned."""

    value: T | None = None
    error: BaseException | None = None


def attempt(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Attempt[T]:
    """Call a plugin's code; everything it raises is returned, except Ctrl-C.

    ``SystemExit`` and other ``BaseException`` are caught too: a plugin that leaves the process
    while it is listed would take down the command that could name it. What it prints goes to
    stderr, so that ``--json`` stays JSON.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Attempt(value=call(*args, **kwargs))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # a stranger's code: recorded and shown
        return Attempt(error=error)


def one_line(error: BaseException) -> str:
    """Return type and message of ``error`` in one line of at most 240 characters."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001  # the exception class is a stranger's as well
        text = "(its message cannot be printed)"
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "…"

"""Comparing names that people typed: one spelling, and the one they probably meant."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

from torchweld.errors import InvalidArgument

P = ParamSpec("P")
R = TypeVar("R")


def canonical(name: str) -> str:
    """Return ``name`` as PEP 503 compares it: ``Label_Smoothing`` is ``label-smoothing``."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def closest(name: str, names: Iterable[str]) -> str:
    """Return the entry of ``names`` that was probably meant by ``name``, or ``""``."""
    known = sorted(set(names))
    for candidate in known:
        if canonical(candidate) == canonical(name):
            return candidate
    found = difflib.get_close_matches(name.lower(), known, n=1)
    return found[0] if found else ""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``"did you mean 'cutmix'?"``, or ``""`` when nothing is near."""
    found = closest(name, names)
    return f"did you mean {found!r}?" if found else ""


def listing(names: Iterable[str]) -> str:
    """Return the names sorted and parted by commas, or ``"none"``."""
    return ", ".join(sorted(set(names))) or "none"


def named_arguments(
    call: str, elsewhere: Mapping[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function answer an argument that it does not take with the one that was meant.

    Args:
        call: what the user calls, e.g. ``"Trainer"``.
        elsewhere: arguments of other libraries to what does it here.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        # The one place that passes on what it is given: it has the signature of what it wraps.
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    instead = (elsewhere or {}).get(name) or did_you_mean(name, known)
                    remedy = instead or f"it takes {listing(known)}"
                    raise InvalidArgument(f"{call}({name}=…): there is no such argument; {remedy}")
            return function(*args, **kwargs)

        return checked

    return decorate

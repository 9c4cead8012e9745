"""Comparing names that people typed: one spelling, and the one they probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


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

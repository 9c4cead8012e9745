"""Findings of the plan as data: one record each, collected and never raised alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note", "allowed"]

TITLES = {
    "TW101": "unknown component",
    "TW102": "unknown slot or token in a plugin's claims",
    "TW103": "unknown or invalid option",
    "TW104": "one name offered by two distributions",
    "TW105": "a selected plugin is broken",
    "TW106": "a requirement or the api number is not met",
    "TW201": "two owners of one slot",
    "TW202": "an edit that the owner forbids",
    "TW203": "two values for one setting",
    "TW301": "a required capability or fact is missing",
    "TW302": "a forbidden fact holds",
    "TW401": "a cycle in the order",
    "TW402": "unordered edits of one slot",
    "TW403": "an order across phases",
    "TW501": "a surgery changed nothing",
    "TW502": "a change outside the claims",
    "TW503": "a parameter in no group or in two",
    "TW504": "the processes disagree",
}


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        code: a key of ``TITLES``, or ``TW6xx`` for a plugin's own run checks.
        severity: ``error`` stops the run; ``allowed`` is an error the user downgraded.
        what: one clause that names the values asked for.
        why: the reason, as the claim that found it states it; may be empty.
        fix: what to do; may be empty.
        who: names of the components (or distributions) concerned, sorted.
    """

    code: str
    severity: Severity
    what: str
    why: str = ""
    fix: str = ""
    who: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """How ``allow=`` names this finding: ``TW302:cutmix+mixup``."""
        return f"{self.code}:{'+'.join(self.who)}" if self.who else self.code

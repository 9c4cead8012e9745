"""From single findings to the problems of a plan: merged per pair, then made strict or allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torchweld.problems import Problem, Severity
from torchweld.spelling import did_you_mean

_RANK = {severity: rank for rank, severity in enumerate(get_args(Severity))}
_DECIDED_LATER = ("TW5", "TW6")
_OF_SURGERIES = ("TW501", "TW502")
_NEVER_ALLOWED = "TW1"  # a component that does not exist, or cannot be built, stays an error


@dataclass(frozen=True)
class Finding:
    """One reason for a problem, before those of the same pair are merged.

    Attributes:
        who: names of the components concerned, in any order.
        what: a clause; ``{}`` in it stands for ``about``.
        about: a slot, token or setting; those of merged findings are listed together.
    """

    code: str
    severity: Severity
    who: Sequence[str]
    what: str
    about: str = ""
    why: str = ""
    fix: str = ""


def merge(findings: Iterable[Finding]) -> list[Problem]:
    """Make one problem of the findings that say the same of the same components."""
    groups: dict[tuple[str, Severity, tuple[str, ...], str], list[Finding]] = {}
    for finding in findings:
        who = tuple(sorted(set(finding.who)))
        groups.setdefault((finding.code, finding.severity, who, finding.what), []).append(finding)
    return [
        Problem(
            code,
            severity,
            # Not str.format: names and values inside the clause may contain braces.
            what=what.replace("{}", enumerate_words(f.about for f in group), 1),
            why="; ".join(_distinct(f.why for f in group)),
            fix="; ".join(_distinct(f.fix for f in group)),
            who=who,
        )
        for (code, severity, who, what), group in groups.items()
    ]


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """The problems without repetition, errors first, then by code, names and text."""
    return tuple(
        sorted(
            dict.fromkeys(problems),
            key=lambda p: (_RANK[p.severity], p.code, p.who, p.what, p.why, p.fix),
        )
    )


def settle_severities(
    problems: Iterable[Problem],
    *,
    allow: Sequence[str] = (),
    strict: bool = False,
    open_keys: Iterable[str] = (),
    later: tuple[str, ...] = _DECIDED_LATER,
) -> tuple[Problem, ...]:
    """Turn warnings into errors under ``strict``, and what ``allow`` names into ``allowed``.

    Args:
        problems: what was found.
        allow: keys such as ``"TW302:cutmix+mixup"``; the names may come in any order.
        strict: the same as the Trainer's.
        open_keys: keys of what may still be found later; an ``allow`` of those is no mistake.
        later: beginnings of codes of which the same is true.

    Returns:
        The problems in order, with a warning for each ``allow`` that matched nothing.
    """
    problems = list(problems)
    wanted = {normal_key(key): key for key in allow}
    still_open = {normal_key(key) for key in open_keys}
    still_open |= {key for key in wanted if key.startswith(later)}
    missed = _unmatched(wanted, [p.key for p in problems], still_open)
    settled = []
    for problem in (*problems, *missed):
        if strict and problem.severity == "warning":
            problem = replace(problem, severity="error")  # noqa: PLW2901 - the same finding
        if problem.key in wanted and _allowable(problem):
            problem = replace(problem, severity="allowed")  # noqa: PLW2901 - the same finding
        settled.append(problem)
    return in_order(settled)


def settle_later(
    problems: Sequence[Problem], *, allow: Sequence[str] = (), strict: bool = False
) -> tuple[Problem, ...]:
    """The same for what surgeries were found to do; their keys cannot be judged earlier."""
    keys = [key for key in allow if normal_key(key).startswith(_OF_SURGERIES)]
    return settle_severities(problems, allow=keys, strict=strict, later=())


def normal_key(key: str) -> str:
    """The key with its names sorted, as ``Problem.key`` has them."""
    code, colon, names = key.partition(":")
    return f"{code}:{'+'.join(sorted(names.split('+')))}" if colon else code


def enumerate_words(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``: every word once, sorted.

    >>> enumerate_words(["step.closure", "grads.whole", "step.closure"])
    'grads.whole and step.closure'
    """
    *first, last = sorted({word for word in words if word}) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


def _allowable(problem: Problem) -> bool:
    severe = problem.severity in {"error", "warning"}
    return severe and not problem.code.startswith(_NEVER_ALLOWED)


def _unmatched(wanted: Mapping[str, str], found: Sequence[str], later: set[str]) -> list[Problem]:
    """A warning for every entry of ``allow`` that cannot have an effect."""
    idle = []
    for normal, key in sorted(wanted.items()):
        if normal.startswith(_NEVER_ALLOWED):
            idle.append(
                (
                    key,
                    "cannot be allowed",
                    "without the component there is nothing to run",
                    found[:0],
                )
            )
        elif not (normal in found or normal in later):
            idle.append(
                (key, "matches no finding of this plan", "it may be a slip of the pen", found)
            )
    return [
        Problem(
            "TW103",
            "warning",
            what=f"allow={key!r} {what}",
            why=why,
            fix=did_you_mean(key, keys) or "take it out",
        )
        for key, what, why, keys in idle
    ]

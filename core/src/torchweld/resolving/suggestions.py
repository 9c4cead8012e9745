"""What to do about an error: changes of one choice that a second resolution accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, replace
from functools import partial

from torchweld.components import Chosen
from torchweld.guard import attempt
from torchweld.problems import Problem
from torchweld.resolving.declared import changed_options, sort_key, value_text, with_options

Judge = Callable[[Sequence[Chosen]], frozenset[str]]
"""Keys of the errors that a resolution of these choices finds."""

_MAX_NAMES = 5


@dataclass(frozen=True)
class _Change:
    """The choices with one of them changed: exchanged, given a default option, or left out."""

    choices: tuple[Chosen, ...]
    out: Chosen
    instead: Chosen | None = None
    option: str = ""


def with_fixes(
    problems: Sequence[Problem], choices: Sequence[Chosen], offered: Sequence[Chosen], judge: Judge
) -> list[Problem]:
    """Add a proven fix to every conflict that has none.

    Args:
        problems: the findings of ``choices``.
        choices: what the user chose.
        offered: every installed component with default options.
        judge: resolves other choices; a change counts when this error is gone and none is new.
    """
    errors = frozenset(p.key for p in problems if p.severity == "error")
    fixed = []
    for problem in problems:
        conflict = problem.severity == "error" and problem.code.startswith(("TW2", "TW3"))
        if problem.fix or not conflict:
            fixed.append(problem)
            continue
        left = errors - {problem.key}
        changes = _changes(problem, sorted(choices, key=sort_key), offered)
        accepted = [change for change in changes if judge(change.choices) <= left]
        fixed.append(replace(problem, fix=_text(accepted)))
    return fixed


def _changes(
    problem: Problem, choices: Sequence[Chosen], offered: Sequence[Chosen]
) -> Iterator[_Change]:
    for chosen in choices:
        others = tuple(one for one in choices if one is not chosen)
        place = (chosen.phase, chosen.split)
        needed = chosen.phase != "surgery" and place not in {(o.phase, o.split) for o in others}
        if chosen.name in problem.who:
            yield from _with_defaults(chosen, others)
            if not needed:
                yield _Change(others, chosen)
        if needed:
            yield from _exchanged(chosen, others, offered)


def _with_defaults(chosen: Chosen, others: tuple[Chosen, ...]) -> Iterator[_Change]:
    """One option of the user's taken back."""
    for name, value in changed_options(chosen).items():
        if value is MISSING:  # a required option has no default to go back to
            continue
        tried = attempt(partial(with_options, chosen, {name: value}))
        if tried.value is not None:
            text = f"{name}={value_text(value)}"
            yield _Change((*others, tried.value), chosen, tried.value, text)


def _exchanged(
    chosen: Chosen, others: tuple[Chosen, ...], offered: Sequence[Chosen]
) -> Iterator[_Change]:
    """Another strategy or data source."""
    for other in sorted(offered, key=sort_key):
        if other.phase == chosen.phase and other.name != chosen.name:
            instead = replace(other, split=chosen.split)
            yield _Change((*others, instead), chosen, instead)


def _text(changes: Sequence[_Change]) -> str:
    out = [change.out.name for change in changes if change.instead is None]
    parts = [f"keep one of them: {' or '.join(out)}"] if len(out) > 1 else []
    parts += [f"set {change.option} for {change.out.name}" for change in changes if change.option]
    exchanged: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        if change.instead is not None and not change.option:
            place = (change.out.phase, change.out.name)
            exchanged.setdefault(place, []).append(change.instead.name)
    for (phase, name), names in exchanged.items():
        parts.append(f"take {phase} {' or '.join(names[:_MAX_NAMES])} instead of {name}")
    if len(out) == 1:
        parts.append(f"leave out {out[0]}")
    return ", or ".join(parts)

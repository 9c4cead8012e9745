"""What to do about an error: changes of one choice that a second resolution accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torchweld.components import Chosen
from torchweld.declared import sort_key
from torchweld.problems import Problem

Judge = Callable[[Sequence[Chosen]], frozenset[str]]
"""Keys of the errors that a resolution of these choices finds."""

_MAX_NAMES = 5


@dataclass(frozen=True)
class _Change:
    """The choices with one of them left out, or exchanged for another."""

    choices: tuple[Chosen, ...]
    out: Chosen
    instead: Chosen | None = None


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
        if (
            problem.severity != "error"
            or problem.fix
            or not problem.code.startswith(("TW2", "TW3"))
        ):
            fixed.append(problem)
            continue
        accepted = [
            change
            for change in _changes(problem, choices, offered)
            if judge(change.choices) <= errors - {problem.key}
        ]
        fixed.append(replace(problem, fix=_text(accepted)))
    return fixed


def _changes(
    problem: Problem, choices: Sequence[Chosen], offered: Sequence[Chosen]
) -> Iterator[_Change]:
    """Leave out one of those concerned, or take another strategy or data source."""
    for chosen in sorted(choices, key=sort_key):
        others = tuple(one for one in choices if one is not chosen)
        place = (chosen.phase, chosen.split)
        needed = chosen.phase != "surgery" and place not in {(o.phase, o.split) for o in others}
        if chosen.name in problem.who and not needed:
            yield _Change(others, chosen)
        if needed:
            for other in sorted(offered, key=sort_key):
                if other.phase == chosen.phase and other.name != chosen.name:
                    swapped = replace(other, split=chosen.split)
                    yield _Change((*others, swapped), chosen, swapped)


def _text(changes: Sequence[_Change]) -> str:
    out = [change.out.name for change in changes if change.instead is None]
    parts = []
    if len(out) > 1:
        parts.append(f"keep one of them: {' or '.join(out)}")
    swaps: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        if change.instead is not None:
            place = (change.out.phase, change.out.name)
            swaps.setdefault(place, []).append(change.instead.name)
    for (phase, name), names in swaps.items():
        some = " or ".join(names[:_MAX_NAMES])
        parts.append(f"take {phase} {some} instead of {name}")
    if len(out) == 1:
        parts.append(f"leave out {out[0]}")
    return ", or ".join(parts)

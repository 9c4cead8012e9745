"""A plan and its problems as text: the screens that people act on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torchweld.resolving.declared import PHASES, options_text, value_text
from torchweld.vocabulary import find_token

if TYPE_CHECKING:
    from torchweld.components import Chosen, Settings
    from torchweld.plan import Plan
    from torchweld.problems import Problem

WIDTH = 100
_LABEL = 10  # columns of "surgery   "
_NAME = 19  # columns of a component's name
_INDENT = _LABEL + 2 + _NAME


def explain_plan(plan: Plan, *, world_size: int | None = None, memory: Sequence[str] = ()) -> str:
    """The whole plan: order with reasons, adjustments, owners, what is open, what is wrong.

    Args:
        plan: to show.
        world_size: number of processes, where it is known.
        memory: lines on what is held on each rank, or on how to ask for it.
    """
    blocks = [
        _headline(plan, world_size),
        "\n".join(
            line
            for phase in PHASES
            for line in (
                *(_core_lines(plan.settings) if phase == "strategy" else ()),
                *_phase_lines(plan, phase, world_size),
            )
        ),
        "\n".join([*_deferred_lines(plan), *_settled_lines(plan), *_memory_lines(memory)]),
        *(problem_text(problem) for problem in plan.problems),
    ]
    if plan.problems:
        blocks.append(_more(plan.problems))
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_problems(problems: Sequence[Problem]) -> str:
    """Every problem with why and fix, under one line that says whether anything was started."""
    errors = [problem for problem in problems if problem.severity == "error"]
    first = f"{'nothing was started; ' if errors else ''}{count_problems(problems)}"
    texts = [problem_text(problem) for problem in problems]
    return "\n".join([first, "", *texts, *([_more(problems)] if problems else [])])


def problem_text(problem: Problem) -> str:
    """One problem: code and what on the first line, why and fix under it."""
    label = "" if problem.severity == "error" else f"{problem.severity}: "
    lines = _hang(f"{problem.code:7}", f"{label}{problem.what}")
    for word, text in (("why", problem.why), ("fix", problem.fix)):
        if text:
            lines += _hang(f"       {word:6}", text)
    if problem.severity == "allowed":
        lines += _hang("       ", f"you allowed it: {problem.key}")
    return "\n".join(lines)


def count_problems(problems: Iterable[Problem]) -> str:
    """``0 problems``, ``2 problems, 1 warning, 3 notes``."""
    severities = [problem.severity for problem in problems]
    words = {"error": "problem", "warning": "warning", "note": "note"}
    counts = [_plural(severities.count(s), word) for s, word in words.items() if s in severities]
    if "allowed" in severities:
        counts.append(f"{severities.count('allowed')} allowed")
    if "error" not in severities:
        counts.insert(0, "0 problems")
    return ", ".join(counts)


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _headline(plan: Plan, world_size: int | None) -> str:
    parts = [
        f"plan {plan.short}",
        _processes(plan, world_size),
        f"precision {plan.settings.precision}",
        count_problems(plan.problems),
    ]
    return "   ".join(part for part in parts if part)


def _processes(plan: Plan, world_size: int | None) -> str:
    if world_size is not None:
        return "1 process" if world_size == 1 else f"{world_size} processes"
    if "world>1" not in plan.facts:
        return ""  # known after the launch
    return "several processes" if plan.facts["world>1"] else "1 process"


def _phase_lines(plan: Plan, phase: str, world_size: int | None) -> Iterator[str]:
    members = [chosen for chosen in plan.order if chosen.phase == phase]
    for number, chosen in enumerate(members, start=1):
        label = phase if number == 1 else ""
        place = f"{number} " if phase == "surgery" else "  "
        head = f"{label:{_LABEL}}{place}{chosen.name:{_NAME}}"
        notes = list(_notes(plan, chosen, world_size))
        yield from _hang(head, notes[0] if notes else "", _INDENT)
        for note in notes[1:]:
            yield from _hang(" " * _INDENT, note, _INDENT)


def _core_lines(settings: Settings) -> Iterator[str]:
    """What core does to the model between the loader and the strategy, in this order."""
    done = {
        "sync_batchnorm": "over all processes" if settings.sync_batchnorm else "",
        "checkpointing": _per_unit(settings.activation_checkpointing),
        "compile": _per_unit(settings.compile),
        "deterministic": _deterministic_text(settings),
    }
    for number, (name, text) in enumerate((n, t) for n, t in done.items() if t):
        label = "" if number else "core"
        yield from _hang(f"{label:{_LABEL}}  {name:{_NAME}}", text, _INDENT)


def _per_unit(options: Any) -> str:
    """The options that differ from their defaults."""
    if options is None:
        return ""
    changed = [f for f in fields(options) if getattr(options, f.name) != f.default]
    said = ", ".join(f"{f.name}={value_text(getattr(options, f.name))}" for f in changed)
    return f"per unit, in place{'   ' if said else ''}{said}"


def _deterministic_text(settings: Settings) -> str:
    if settings.deterministic == "warn":
        return "where torch has such an algorithm; warns elsewhere"
    return "during the run" if settings.deterministic else ""


def _notes(plan: Plan, chosen: Chosen, world_size: int | None) -> Iterator[str]:
    line = "   ".join(fact for fact in _facts(plan, chosen, world_size) if fact)
    if line:
        yield line
    in_phase = {other.name for other in plan.order if other.phase == chosen.phase}
    for edge in plan.edges:
        if edge.then == chosen.name and edge.first in in_phase:
            yield f"after {edge.first}: {edge.reason}"
    yield from (entry.text for entry in plan.adjusted if entry.component == chosen.name)


def _facts(plan: Plan, chosen: Chosen, world_size: int | None) -> Iterator[str]:
    yield options_text(_as_chosen(plan, chosen))
    if chosen.split:
        yield "for the splits beside training"
    if chosen.phase == "data" and world_size is not None and world_size > 1:
        yield f"{world_size} shards"
    if chosen.phase == "strategy":
        yield _owner_text(plan, chosen)


def _as_chosen(plan: Plan, adapted: Chosen) -> Chosen:
    """The choice before adaptation, whose options are the user's."""
    place = (adapted.phase, adapted.name, adapted.split, adapted.position)
    same = (c for c in plan.choices if (c.phase, c.name, c.split, c.position) == place)
    return next(same, adapted)


def _owner_text(plan: Plan, chosen: Chosen) -> str:
    """What the owner of ``engine`` and ``precision`` decides, concern by concern."""
    owned = [slot for slot, names in plan.owned.items() if chosen.name in names]
    concerns = _engine_concerns(plan.settings) if "engine" in owned else []
    if "precision" in owned:
        concerns.append(f"precision ({plan.settings.precision})")
    concerns += sorted(set(owned) - {"engine", "precision"})
    return f"owns {', '.join(concerns)}" if concerns else ""


def _engine_concerns(settings: Settings) -> list[str]:
    value = settings.gradient_clip_val
    clipping = f"{settings.gradient_clip_algorithm} {value}" if value else "off"
    accumulation = f"accumulation ({settings.accumulate_grad_batches})"
    return ["backward", accumulation, f"clipping ({clipping})", "step"]


def _deferred_lines(plan: Plan) -> list[str]:
    asked: dict[str, list[str]] = {}
    for entry in plan.deferred:
        asked.setdefault(_clause(entry.relation), []).append(entry.component)
    parts = [f"{clause} ({', '.join(sorted(set(who)))})" for clause, who in sorted(asked.items())]
    return _hang(f"{'checked at fit':18}", " · ".join(parts)) if parts else []


def _clause(relation: str) -> str:
    """``not world>1`` as "there is one process", ``when X`` as "whether X"."""
    word, _, name = relation.rpartition(" ")
    token = find_token(name)
    if token is None:
        return relation
    if word == "not":
        return token.fails
    return f"whether {token.holds}" if word else token.holds


def _settled_lines(plan: Plan) -> list[str]:
    lines: list[str] = []
    for entry in plan.settled:
        label = "" if lines else "settled for you"
        lines += _hang(f"{label:18}", f"{entry.what} ({entry.why})" if entry.why else entry.what)
    return lines


def _memory_lines(memory: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for line in memory:
        lines += _hang(f"{'' if lines else 'memory':18}", line)
    return lines


def _more(problems: Sequence[Problem]) -> str:
    codes = list(dict.fromkeys(problem.code for problem in problems))
    return f"more on a code: torchweld explain {codes[-1]}"


def _hang(head: str, text: str, indent: int | None = None) -> list[str]:
    """``head`` and ``text`` wrapped at WIDTH, continued under the beginning of ``text``."""
    indent = len(head) if indent is None else indent
    if len(head) > indent:
        head += " "
    if not text:
        return [head.rstrip()]
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )

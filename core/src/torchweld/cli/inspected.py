"""What ``torchweld inspect`` adds for a plan; imported only by that command, with torch."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchweld.checkpoint.format import read_manifest
from torchweld.checkpoint.resuming import Change, Under, find_changes, saved_plan
from torchweld.cli.building import build_model, working_directory
from torchweld.cli.planned import plan_of_words
from torchweld.components import Settings
from torchweld.model.parameters import model_digest, model_lines
from torchweld.model.surgery import claimed_slots
from torchweld.plan import Plan
from torchweld.registry import Registry
from torchweld.resolving.explain import WIDTH, render_problems
from torchweld.vocabulary import find_token

_LABEL = 12


@dataclass(frozen=True)
class Resuming:
    """A checkpoint under a plan.

    Attributes:
        plan: with the facts of the saved run.
        world_size: number of processes.
        changes: what would be different; empty where the plan has errors.
    """

    plan: Plan
    world_size: int
    changes: tuple[Change, ...]

    @property
    def is_possible(self) -> bool:
        """Whether nothing is known that would stop the run before its first step."""
        return not (self.plan.has_errors or any(change.refused for change in self.changes))

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "possible": self.is_possible,
            "plan": self.plan.digest,
            "world_size": self.world_size,
            "changes": [asdict(change) for change in self.changes],
            "problems": [asdict(problem) for problem in self.plan.problems],
        }

    def text(self) -> str:
        """A line that says whether it can be, one for each change, and the plan's problems."""
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        verdict = "can resume" if self.is_possible else "would be refused"
        lines = [f"{verdict} under plan {self.plan.short} on {processes}"]
        if self.plan.has_errors:
            return "\n".join([*lines, "", render_problems(self.plan.problems)]).rstrip()
        for change in self.changes:
            mark = "refused" if change.refused else ""
            values = change.before
            if change.now != change.before:
                values = f"{change.before} -> {change.now}"
            text = f"{change.what}: {values}" + (f"   {change.effect}" if change.effect else "")
            lines += textwrap.wrap(
                text,
                WIDTH,
                initial_indent=f"{mark:{_LABEL}}",
                subsequent_indent=" " * (_LABEL + 2),
                break_long_words=False,
                break_on_hyphens=False,
            )
        return "\n".join(lines)


def resuming(
    registry: Registry,
    directory: Path,
    words: Sequence[str],
    *,
    world_size: int | None,
    model: str | None,
) -> Resuming:
    """Compare a checkpoint with the plan of ``words``.

    Args:
        registry: what can be chosen.
        directory: of a checkpoint whose manifest can be read.
        words: as for ``torchweld plan``.
        world_size: number of processes; None for as many as wrote it.
        model: ``"pkg:make"``, from which it is known whether it is the same model.

    Raises:
        InvalidArgument: the words do not fit the grammar, or the model cannot be built.
        CheckpointError: no run wrote the checkpoint.
    """
    header = read_manifest(directory)["header"]
    before = saved_plan(header)
    world = world_size or int(header["data"]["world_size"])
    plan = plan_of_words(registry, words, world_size=world, allow=(), strict=False)
    plan = plan.with_facts(_facts_of_fit(before))
    if plan.has_errors:
        return Resuming(plan, world, ())
    under = Under(
        plan,
        world,
        model_digest=None if model is None else _digest(plan, model),
        edits_model=lambda name: _edits_model(registry, plan.settings, name),
    )
    return Resuming(plan, world, tuple(find_changes(header, under)))


def _facts_of_fit(before: Mapping[str, Any]) -> dict[str, bool]:
    """What model, loss and first batch told the run that was saved; they will tell it again."""
    facts: Mapping[str, bool] = before.get("facts", {})
    known = {name: find_token(name) for name in facts}
    return {
        n: facts[n] for n, token in known.items() if token is not None and token.source == "fit"
    }


def _digest(plan: Plan, model: str) -> str:
    with working_directory():
        made, _ = build_model(plan, model)
    return model_digest(model_lines(made))


def _edits_model(registry: Registry, settings: Settings, name: str) -> bool:
    """Whether a surgery may; one that is not installed might."""
    chosen, _ = registry.choose(name, "surgery")
    return chosen is None or "model.modules" in claimed_slots(chosen.claims(settings))

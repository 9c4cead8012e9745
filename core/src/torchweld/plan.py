"""The frozen result of resolution: what will run, in which order, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from torchweld.components import Chosen, Settings
from torchweld.errors import PlanError
from torchweld.identity import identity
from torchweld.resolving.explain import explain_plan, render_problems

if TYPE_CHECKING:
    from torchweld.problems import Problem
    from torchweld.resolving.adaptation import Adjustment
    from torchweld.resolving.conflicts import Deferred
    from torchweld.resolving.memory import Memory
    from torchweld.resolving.ordering import Edge

SHORT = 6
"""Characters of the digest that are printed."""


class Settled(NamedTuple):
    """What a component decides that is silent elsewhere, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What was chosen, adapted, ordered and found; made once while planning, again at fit.

    Attributes:
        order: the components after adaptation: surgery, data, strategy, each in running order.
        edges: ``(first, then, reason)``, inside one phase.
        adjusted: ``(component, text)`` for every option or setting that was changed.
        settled: ``(what, why)`` for what is decided silently elsewhere.
        deferred: ``(component, relation, reason)`` for what is checked after the launch or at fit.
        settings: after what components ask for.
        problems: all severities, errors first.
        digest: sha256 over names, versions, options, order and settings.
        facts: the run and fit tokens that were known.
        owned: slot to the names of its owners.
        choices: what the user chose, before adaptation.
        again: resolves the same choices with other facts.
        settle: gives findings of a later moment the severities that the user asked for.
    """

    order: tuple[Chosen, ...]
    edges: tuple[Edge, ...]
    adjusted: tuple[Adjustment, ...]
    settled: tuple[Settled, ...]
    deferred: tuple[Deferred, ...]
    settings: Settings
    problems: tuple[Problem, ...]
    digest: str
    facts: Mapping[str, bool] = field(default_factory=dict, compare=False)
    owned: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)
    choices: tuple[Chosen, ...] = field(default=(), compare=False, repr=False)
    again: Callable[..., Plan] | None = field(default=None, compare=False, repr=False)
    settle: Callable[[Sequence[Problem]], tuple[Problem, ...]] = field(
        default=tuple, compare=False, repr=False
    )

    def __repr__(self) -> str:
        """One line; the screen is :meth:`explain`."""
        names = ", ".join(chosen.component.name for chosen in self.order)
        return f"<Plan {self.short}: {names}>"

    @property
    def short(self) -> str:
        """The beginning of the digest, as printed and in the names of run directories."""
        return self.digest[:SHORT]

    @property
    def strategy(self) -> Chosen | None:
        """The strategy, or None where none could be chosen."""
        return self._first("strategy", "")

    @property
    def data(self) -> Chosen | None:
        """The data source of training, or None where none could be chosen."""
        return self._first("data", "")

    @property
    def val_data(self) -> Chosen | None:
        """The data source of the other splits, where it is another choice than ``data``."""
        return self._first("data", "val")

    @property
    def surgeries(self) -> tuple[Chosen, ...]:
        """The surgeries in running order."""
        return tuple(chosen for chosen in self.order if chosen.phase == "surgery")

    @property
    def has_errors(self) -> bool:
        """Whether the run may not start."""
        return any(problem.severity == "error" for problem in self.problems)

    def explain(self, *, world_size: int | None = None) -> str:
        """The plan as text: order with reasons, adjustments, owners, open checks, problems."""
        return explain_plan(self, world_size=world_size)

    def to_json(self, *, memory: Memory | None = None) -> str:
        """The same as data; the keys are those of the plan's attributes and stay.

        Args:
            memory: an estimate to put beside them, as ``"memory"``.
        """
        data = self._as_dict()
        if memory is not None:
            data["memory"] = memory.as_data()
        return json.dumps(data, indent=2, sort_keys=True, default=identity)

    def summary(self) -> Mapping[str, str]:
        """Flat text, one entry a component and setting: what processes compare and diff."""
        lines: dict[str, str] = {}
        for place, chosen in enumerate(self.order, start=1):
            lines[f"{place} {chosen.phase}{_split(chosen)}"] = describe(chosen)
        lines |= {
            f"settings.{setting.name}": identity(getattr(self.settings, setting.name))
            for setting in fields(self.settings)
        }
        return {"digest": self.digest, **lines}

    def with_facts(self, facts: Mapping[str, bool]) -> Plan:
        """Resolve the same choices again, now that ``facts`` are known too."""
        assert self.again is not None, "only a plan made by resolve() can be resolved again"
        return self.again(facts={**self.facts, **facts})

    def raise_for_problems(self) -> None:
        """Raise what the plan found, all of it at once.

        Raises:
            PlanError: there is at least one error.
        """
        if self.has_errors:
            errors = [problem for problem in self.problems if problem.severity == "error"]
            raise PlanError(render_problems(self.problems), errors)

    def _first(self, phase: str, split: str) -> Chosen | None:
        found = (c for c in self.order if c.phase == phase and c.split == split)
        return next(found, None)

    def _as_dict(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "settings": asdict(self.settings),
            "facts": dict(self.facts),
            "order": [_chosen_as_dict(chosen) for chosen in self.order],
            "edges": [edge._asdict() for edge in self.edges],
            "adjusted": [entry._asdict() for entry in self.adjusted],
            "settled": [entry._asdict() for entry in self.settled],
            "deferred": [entry._asdict() for entry in self.deferred],
            "owned": {slot: list(names) for slot, names in self.owned.items()},
            "problems": [asdict(problem) for problem in self.problems],
        }


def make_digest(order: Sequence[Chosen], settings: Settings) -> str:
    """Hash what will run; equal in every process that would do the same."""
    parts = [f"{chosen.phase}{_split(chosen)} {describe(chosen)}" for chosen in order]
    return hashlib.sha256("\n".join([*parts, identity(settings)]).encode()).hexdigest()


def describe(chosen: Chosen) -> str:
    """Name, origin and options of a component, without anything that differs between processes."""
    build = chosen.component.build
    what = build if isinstance(build, str) else identity(build)
    origin = f"{chosen.origin.distribution} {chosen.origin.version}".strip() or what
    options = f" {identity(chosen.options)}" if chosen.options is not None else ""
    return f"{chosen.name} ({origin}){options}"


def _split(chosen: Chosen) -> str:
    return f" ({chosen.split})" if chosen.split else ""


def _chosen_as_dict(chosen: Chosen) -> dict[str, Any]:
    options = {} if chosen.options is None else _options_as_dict(chosen.options)
    return {
        "phase": chosen.phase,
        "split": chosen.split,
        "name": chosen.name,
        "summary": chosen.component.summary,
        "distribution": chosen.origin.distribution,
        "version": chosen.origin.version,
        "options": options,
    }


def _options_as_dict(options: Any) -> dict[str, Any]:
    """Values that JSON has as they are, everything else as the text that enters the digest."""
    plain = (str, int, float, bool, type(None))
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return {k: v if isinstance(v, plain) else identity(v) for k, v in values.items()}

"""What a component declares about itself: records only, no vocabulary, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Union

Phase = Literal["surgery", "data", "strategy"]


@dataclass(frozen=True)
class Rel:
    """One relation to a slot, a token or (order only) a component.

    Attributes:
        target: name of the slot or token.
        reason: a clause that is printed to whoever meets the relation.
        fix: what to do when it is not met; printed, may be empty.
        severity: ``warning`` lets the run go on.
    """

    target: str
    reason: str = ""
    fix: str = ""
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Adapt:
    """Options to take instead while a token holds (``when``) or is missing (``unless``)."""

    options: Mapping[str, object]
    reason: str
    when: str = ""
    unless: str = ""


Rels = Union[str, Rel, Iterable[Union[str, Rel]]]


def relations(value: Rels) -> tuple[Rel, ...]:
    """Return ``value`` as a tuple of relations: a name, a ``Rel`` or a sequence of both.

    A forgotten comma makes ``(Rel(...))`` a plain ``Rel`` and ``("x")`` a plain string: one each.
    """
    items: Iterable[str | Rel] = (value,) if isinstance(value, (str, Rel)) else value
    return tuple(Rel(item) if isinstance(item, str) else item for item in items)


@dataclass(frozen=True)
class Claims:
    """What one configured component does to the run.

    ``owns`` and ``edits`` left at ``None`` take the default of the phase, each on its own:
    a strategy owns ``engine`` and ``precision``, a data source owns ``data.loader``, a surgery
    edits ``model.modules``. ``()`` says "nothing at all".

    Attributes:
        owns: slots that this component takes over.
        edits: slots that it changes.
        provides: tokens that hold because of it; a strategy states what stays possible under it.
        lacks: token to the reason why it is not provided; printed to whoever requires it.
        requires: tokens that must hold.
        forbids: tokens that must not hold.
        before: what it must come before, inside its own phase.
        after: what it must come after, inside its own phase.
        adapts: options that change with the facts.
        sets: ``(setting, value, reason)``: no edit, core is asked for this setting.
        settles: ``(what, why)``: decided silently elsewhere, printed in the plan here.
    """

    owns: Rels | None = None
    edits: Rels | None = None
    provides: str | Sequence[str] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    requires: Rels = ()
    forbids: Rels = ()
    before: Rels = ()
    after: Rels = ()
    adapts: Adapt | Sequence[Adapt] = ()
    sets: Sequence[tuple[str, object, str]] = ()
    settles: Sequence[tuple[str, str]] = ()

"""Composer ``Algorithm`` objects as components, recognised without importing composer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torchweld import Claims, Component, Rel
from torchweld_composer.components import (
    BLURPOOL,
    CHANNELS_LAST,
    CUTMIX,
    LABEL_SMOOTHING,
    NEEDS,
    VISIBLE,
    mixer_claims,
)
from torchweld_composer.events import (
    BATCH,
    GRADS,
    LOSS,
    OPTIMIZER,
    PLACED,
    STEP,
    SURGERY,
    TARGETS,
    refusal,
)
from torchweld_composer.known import READS_WEIGHTS, WRITES_WEIGHTS, known

_BASE = ("composer.core.algorithm", "Algorithm")


def is_algorithm(obj: object) -> bool:
    """Whether ``obj`` is a Composer ``Algorithm``, decided by the names of its classes."""
    return any((kind.__module__, kind.__name__) == _BASE for kind in type(obj).__mro__)


def algorithm_of(component: Component) -> Adopted | None:
    """The adopted algorithm behind ``component``, also where core has put a layer around it."""
    build = component.build
    for candidate in (build, getattr(build, "build", None)):
        if isinstance(candidate, Adopted):
            return candidate
    return None


@dataclass(frozen=True)
class Adopted:
    """Builds the surgery of an algorithm object that the user made.

    Attributes:
        algorithm: the user's object itself; what it keeps can be read from it after the run.
        name: of the component.
        events: that a stranger's algorithm answered when asked; empty for Composer's own.
    """

    algorithm: Any
    name: str
    events: tuple[str, ...] = ()

    def __call__(self) -> Any:
        """Return the surgery."""
        from torchweld_composer.adapter import AlgorithmSurgery, known_surgery
        from torchweld_composer.driver import Role

        entry = known(self.algorithm)
        if entry is not None:
            return known_surgery(self.algorithm, entry)
        return AlgorithmSurgery(self.algorithm, Role(self.name, self.events, watched=True))


def adopted_component(algorithm: Any) -> Component:
    """The component that runs ``algorithm``: with the claims of its class, or of its events."""
    entry = known(algorithm)
    if entry is None:
        return _stranger(algorithm)
    named = [c for c in (BLURPOOL, CHANNELS_LAST, CUTMIX, LABEL_SMOOTHING) if c.name == entry.name]
    if named:
        return _named(named[0], algorithm)
    claims = entry.claims(algorithm)
    return Component(
        name=entry.name,
        summary=entry.summary,
        build=Adopted(algorithm, entry.name),
        claims=claims,
        needs=(*NEEDS, *entry.needs),
    )


def _named(component: Component, algorithm: Any) -> Component:
    """One of the four components with the object in place of its options."""
    if component is CHANNELS_LAST:  # the object has no options, and the component's can be adjusted
        return component
    claims = component.claims
    if component is CUTMIX:
        claims = mixer_claims(interpolate_loss=algorithm.interpolate_loss, images=True)
    build = Adopted(algorithm, component.name)
    return replace(component, build=build, options=None, claims=claims)


def _stranger(algorithm: Any) -> Component:
    from torchweld_composer.probe import answered_events

    name = snake_case(type(algorithm).__name__)
    answered = answered_events(algorithm)
    events = tuple(event for event in PLACED if event in answered)
    return Component(
        name=name,
        summary=f"Composer algorithm {type(algorithm).__name__}",
        build=Adopted(algorithm, name, events),
        claims=claims_of_events(name, answered),
        needs=NEEDS,
    )


def claims_of_events(name: str, events: tuple[str, ...]) -> Claims:
    """Claims of an algorithm of which only the events are known: all that it could do there.

    An event that a torchweld loop does not have becomes a requirement that nothing meets.
    """
    answered = set(events)
    nowhere = sorted(answered.difference(PLACED))
    edits: list[str] = []
    requires = [
        Rel(f"composer:{event}", refusal(name, [event]), "let match() leave this event out")
        for event in nowhere
    ]
    if answered & set(SURGERY):
        edits.append("model.modules")
    if answered & {*BATCH, *TARGETS}:
        edits += ["batch.inputs", "batch.targets"]
    if answered & set(LOSS):
        edits.append("loss.fn")
    if answered & {*TARGETS, *LOSS}:
        requires.append(VISIBLE)
    if answered & set(GRADS):
        edits.append("grads")
        requires.append(Rel("grads.elementwise", "it may change every gradient"))
        requires.append(Rel("grads.whole", "it may look at whole gradients"))
    if answered & {*OPTIMIZER, *STEP}:
        edits.append("optimizer")
    if answered - {*SURGERY, *BATCH, *TARGETS, *LOSS, *nowhere}:
        requires += [READS_WEIGHTS, WRITES_WEIGHTS]
    return Claims(edits=tuple(edits), requires=tuple(requires))


def snake_case(name: str) -> str:
    """Return ``ChannelsLast`` as ``channels_last``.

    >>> snake_case("MyEMADecay")
    'my_ema_decay'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()

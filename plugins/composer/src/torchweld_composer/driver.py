"""One algorithm in one run: its state, and the one way to ask it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchweld.errors import PluginError, RunError, TorchweldError
from torchweld.interfaces import Run
from torchweld_composer.clock import Clock
from torchweld_composer.events import refusal
from torchweld_composer.imports import composer_module
from torchweld_composer.state import AlgorithmLogger, AlgorithmState

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Role:
    """How an algorithm takes part.

    Attributes:
        name: of the component.
        events: names of the events it is asked at.
        asks: its ``match`` decides each time; otherwise the events alone decide.
        timed: it follows the progress of the run.
        watched: it is a stranger's, so events beyond ``events`` are refused when it answers them.
        unresumable: why a checkpoint cannot continue it; empty when one can.
    """

    name: str
    events: tuple[str, ...]
    asks: bool = True
    timed: bool = False
    watched: bool = False
    unresumable: str = ""


class Driver:
    """Fires Composer's events at one algorithm.

    Attributes:
        forward: the prepared forward, once bound; the bare model before.
    """

    def __init__(self, algorithm: Any, role: Role, model: nn.Module) -> None:
        self.algorithm = algorithm
        self.role = role
        self.clock = Clock()
        self.state = AlgorithmState(model, self.clock)
        self.logger = AlgorithmLogger()
        self.forward: Any = model
        self._events = {event.name: event for event in composer_module("composer.core").Event}
        self._bound_to: Run | None = None

    def bind(self, run: Run) -> None:
        """Take what only the prepared run knows; every piece calls it, once is enough."""
        if self._bound_to is run:
            return
        self._bound_to = run
        self.clock.bind(run)
        self.forward = run.model
        if run.model.optimizer is not None:
            self.state.optimizers = [run.model.optimizer]
        if self.role.timed and not self.role.watched and self.clock.total_steps is None:
            raise RunError(
                f"{self.role.name} follows the progress of the run, whose length is unknown: "
                "the data have no length; give Trainer(max_steps=…)"
            )

    def actions(self, events: Iterable[str]) -> tuple[Callable[[], None], ...]:
        """What to call at those of ``events`` that the algorithm is asked at, in this order.

        Each raises ``PluginError``, with the name of the algorithm and the event, for whatever
        the algorithm raises.
        """
        return tuple(self._action(name) for name in self.chosen(events))

    def _action(self, name: str) -> Callable[[], None]:
        event, state, logger = self._events[name], self.state, self.logger
        match, apply, asks = self.algorithm.match, self.algorithm.apply, self.role.asks

        def act() -> None:
            try:
                if not asks or match(event, state):
                    apply(event, state, logger)
            except TorchweldError:
                raise
            except Exception as error:
                raise PluginError(
                    f"{self.role.name} failed at Composer's event {name}: "
                    f"{type(error).__name__}: {error}"
                ) from error

        return act

    def chosen(self, events: Iterable[str]) -> tuple[str, ...]:
        """Those of ``events`` that the algorithm is asked at."""
        return tuple(event for event in events if event in self.role.events)

    def refuse_other_events(self) -> None:
        """Ask a stranger's algorithm about every event that it has no place for, now.

        Raises:
            RunError: it would act at one of them, and that would be left out.
        """
        others = [name for name in self._events if name not in self.role.events]
        answered = self._answered(others)
        if answered:
            raise RunError(refusal(self.role.name, answered))

    def _answered(self, events: Collection[str]) -> list[str]:
        try:
            return [n for n in events if self.algorithm.match(self._events[n], self.state)]
        except Exception as error:
            raise PluginError(
                f"{self.role.name} failed when asked for its events: "
                f"{type(error).__name__}: {error}"
            ) from error

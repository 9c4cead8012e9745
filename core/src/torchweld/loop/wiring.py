"""Everything of one run, made by the set-up and bound once: what a run is written with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from torchweld.interfaces import Callback, Loader, Logger, Parts, Prepared
    from torchweld.loop.console import Console
    from torchweld.loop.evaluation import Evaluator
    from torchweld.loop.feed import Feed
    from torchweld.loop.handle import Handle
    from torchweld.loop.joint import Handles
    from torchweld.loop.recorder import Recorder
    from torchweld.loop.schedules import Schedule
    from torchweld.loop.timetable import Timetable
    from torchweld.plan import Plan
    from torchweld.processes.ranks import Ranks


@dataclass(frozen=True)
class Validation:
    """The data of ``val=``: loaders by name (``""`` for the only one) and how much of each."""

    loaders: Mapping[str, Loader] = field(default_factory=dict)
    limit: int | float | None = None

    def num_batches(self, loader: Loader) -> int | None:
        """How many batches to read of ``loader``; None for all."""
        if self.limit is None or loader.num_batches is None:
            return self.limit if isinstance(self.limit, int) else None
        if isinstance(self.limit, float):
            return max(1, round(loader.num_batches * self.limit))
        return self.limit


@dataclass(frozen=True)
class Member:
    """One of several models of a run.

    Attributes:
        model: the bare module after surgery.
        schedule: of this model's learning rate, or None.
    """

    model: nn.Module
    prepared: Prepared
    handle: Handle
    schedule: Schedule | None

    @property
    def trains(self) -> bool:
        """Whether it has an optimizer; without one it is frozen and stays in evaluation."""
        return self.prepared.optimizer is not None

    @property
    def forward_is_bare(self) -> bool:
        """Whether calling the user's module is the same as calling the handle."""
        return self.prepared.forward is self.model


@dataclass(frozen=True)
class Wiring:
    """The parts of a run.

    Attributes:
        model: the bare module after surgery.
        parts: with every bindable bound.
        stateful: component name to objects of its that have ``state_dict``.
        scheduler: what ``lr_scheduler=`` made, or all of several models as one; for its state.
        schedule: when it is stepped; None for nothing, and where the members have their own.
        directory: of this run, or None where nothing is written.
        root: ``default_root_dir``, where checkpoints are looked for.
        model_digest: of names, shapes and dtypes.
        group_names: names of the parameters in each group of the optimizer.
        optimizer_class: of the optimizer that the user asked for.
        provides: tokens of the strategy.
        make_loader: ``data -> loader`` for evaluation.
        members: the models by name where there are several; ``prepared`` is then all of them
            together.
    """

    plan: Plan
    ranks: Ranks
    model: nn.Module
    parts: Parts
    prepared: Prepared
    handle: Handle | Handles
    table: Timetable
    feed: Feed
    recorder: Recorder
    evaluator: Evaluator
    validation: Validation
    scheduler: Any | None
    schedule: Schedule | None
    callbacks: Sequence[Callback]
    loggers: Sequence[Logger]
    console: Console
    stateful: Mapping[str, Any]
    directory: Path | None
    root: Path
    model_digest: str
    hparams: Mapping[str, Any]
    group_names: Sequence[Sequence[str]]
    optimizer_class: str
    provides: frozenset[str]
    make_loader: Callable[[Any], Loader]
    loss: Callable[[Any, Any], Any] | None
    members: Mapping[str, Member] = field(default_factory=dict)

    @property
    def is_closure(self) -> bool:
        """Whether the optimizer evaluates the loss itself."""
        return needs_closure(self.prepared.optimizer)

    @cached_property
    def optimizers(self) -> dict[str, Any]:
        """The optimizers by the name under which their learning rate is logged."""
        if not self.members:
            return {} if self.prepared.optimizer is None else {"lr": self.prepared.optimizer}
        trained = {name: member for name, member in self.members.items() if member.trains}
        return {f"lr/{name}": member.prepared.optimizer for name, member in trained.items()}

    @cached_property
    def forward_is_bare(self) -> bool:
        """Whether calling the user's module is the same as calling ``run.model``."""
        if self.members:
            return all(m.forward_is_bare for m in self.members.values() if m.trains)
        return self.prepared.forward is self.model

    @cached_property
    def schedules(self) -> list[Schedule]:
        """Of all models."""
        every = [self.schedule, *(member.schedule for member in self.members.values())]
        return [schedule for schedule in every if schedule is not None]

    @property
    def _stepped_scheduler(self) -> Any | None:
        """The scheduler, if it is stepped after each optimizer step."""
        schedule = self.schedule
        return schedule.scheduler if schedule is not None and schedule.interval == "step" else None

    def advance(self) -> Callable[[], Any]:
        """The step of the inner loops: with scheduler and after-steps only where there are any."""
        step, scheduler = self.prepared.step, self._stepped_scheduler
        after = self.parts.after_step
        if scheduler is None and not after:
            return step

        def advance() -> None:
            if step():
                if scheduler is not None:
                    scheduler.step()
                for act in after:
                    act()  # type: ignore[operator]  # bound by the set-up

        return advance

    def advance_closure(self) -> Callable[[Callable[[], Tensor]], Any]:
        """The same for an optimizer that needs a closure."""
        step, scheduler = self.prepared.step_closure, self._stepped_scheduler
        assert step is not None

        def advance(closure: Callable[[], Tensor]) -> None:
            if step(closure):
                if scheduler is not None:
                    scheduler.step()
                for act in self.parts.after_step:
                    act()  # type: ignore[operator]  # bound by the set-up

        return advance


def needs_closure(optimizer: Any | None) -> bool:
    """Whether ``optimizer.step`` cannot do without a closure, as with LBFGS.

    An optimizer whose closure is optional by signature and needed in fact (a SAM wrapper) says so
    with an attribute ``needs_closure = True``.
    """
    if optimizer is None:
        return False
    if getattr(optimizer, "needs_closure", False):
        return True
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty

"""Schedules of the learning rate: by step, by epoch, or by a metric; core steps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchweld.callbacks.monitored import measured_anew, value_of
from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from torchweld.loop.timetable import Timetable

_BY_METRIC = (
    "LRSchedule(functools.partial(ReduceLROnPlateau, patience=5), monitor='val_loss'), given as "
    "lr_scheduler=, says which and steps it"
)
_CALL = "it is called with (optimizer, total_steps): lambda optimizer, _: StepLR(optimizer, 30)"


@dataclass(frozen=True)
class LRSchedule:
    """A schedule and when core steps it, for ``lr_scheduler=``.

    Args:
        factory: ``(optimizer, total) -> scheduler``; ``total`` counts what the schedule is stepped
            by: optimizer steps, or epochs with ``interval="epoch"``. With ``monitor`` it is the
            number of optimizer steps, or None where nobody knows it. ReduceLROnPlateau, or a
            ``functools.partial`` of it, may be given as it is.
        interval: ``"step"``, after each optimizer step that was applied (fp16 skips some), which
            is the default; or ``"epoch"``, at the ends of epochs.
        monitor: the scheduler is stepped with this metric, as ReduceLROnPlateau is, each time it
            was measured anew: one of validation (``"val_…"``) after each validation, any other at
            the ends of epochs, with its mean over the epoch. It is equal on every process.

    Raises:
        InvalidArgument: an unknown interval, or ``interval="step"`` with a metric.
    """

    factory: Callable[[Optimizer, Any], Any]
    interval: Literal["step", "epoch"] | None = None
    monitor: str | None = None

    def __post_init__(self) -> None:
        refuse_made("LRSchedule(", self.factory, ")")
        if self.interval not in {None, "step", "epoch"}:
            raise InvalidArgument(f"interval={self.interval!r}: choose 'step' or 'epoch'")
        if self.monitor is not None and self.interval == "step":
            raise InvalidArgument(
                f"LRSchedule(interval='step', monitor={self.monitor!r}): no metric is measured in "
                "every step; leave interval out"
            )


def refuse_made(before: str, given: Any, after: str = "") -> None:
    """Refuse a scheduler that was made already, of an optimizer that this run does not train with.

    Raises:
        InvalidArgument: says what to give in its place.
    """
    if callable(given):
        return
    how = "give a function (optimizer, total_steps) -> scheduler, or an LRSchedule"
    if isinstance(given, ReduceLROnPlateau):
        how = f"it needs a metric: {_BY_METRIC}"
    if not hasattr(given, "step"):
        raise InvalidArgument(f"{before}{given!r}{after} is no schedule: {how}")
    raise InvalidArgument(
        f"{before}{type(given).__name__}(…){after} belongs to an optimizer made before; {how}"
    )


@dataclass(frozen=True)
class Schedule:
    """The scheduler of a run and when it is stepped.

    Attributes:
        scheduler: torch's, or anything with ``step``, ``state_dict`` and ``load_state_dict``.
        interval: ``"step"``, ``"epoch"`` or ``"metric"``.
        monitor: the metric of the last.
    """

    scheduler: Any
    interval: Literal["step", "epoch", "metric"] = "step"
    monitor: str = ""

    def at_border(self, kinds: set[str], metrics: Mapping[str, float]) -> None:
        """Step at a border where the schedule is due; ``kinds`` are the border's.

        Raises:
            InvalidArgument: the run has no such metric.
        """
        if self.interval == "epoch" and "epoch_end" in kinds:
            self.scheduler.step()
        elif self.interval == "metric" and measured_anew(self.monitor, kinds):
            self.scheduler.step(value_of(self.monitor, metrics, "LRSchedule"))


def make_schedule(
    given: Any, optimizer: Optimizer | None, table: Timetable, *, world_size: int
) -> Schedule | None:
    """Make the scheduler of ``lr_scheduler=``; None for None.

    Raises:
        InvalidArgument: it cannot be made, or not be stepped as asked.
    """
    if given is None:
        return None
    asked = given if isinstance(given, LRSchedule) else LRSchedule(given)
    plateau = _is_plateau(asked.factory)
    if plateau and asked.monitor is None:
        raise InvalidArgument(f"lr_scheduler=ReduceLROnPlateau needs a metric: {_BY_METRIC}")
    total = _total(asked, table, world_size)
    arguments: tuple[Any, ...] = (optimizer,) if plateau else (optimizer, total)
    try:
        scheduler = asked.factory(*arguments)
    except TypeError as error:
        raise InvalidArgument(f"lr_scheduler cannot be made ({error}): {_CALL}") from error
    if not hasattr(scheduler, "step"):
        raise InvalidArgument(
            f"lr_scheduler returned {type(scheduler).__name__}, which has no step(): {_CALL}"
        )
    if asked.monitor is not None:
        return Schedule(scheduler, "metric", asked.monitor)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise InvalidArgument(
            f"lr_scheduler returned ReduceLROnPlateau, which needs a metric: {_BY_METRIC}"
        )
    return Schedule(scheduler, asked.interval or "step")


def _is_plateau(factory: Any) -> bool:
    """Whether it is torch's class itself, whose second argument is no number of steps."""
    plain = factory.func if isinstance(factory, partial) else factory
    return isinstance(plain, type) and issubclass(plain, ReduceLROnPlateau)


def _total(asked: LRSchedule, table: Timetable, world_size: int) -> int | None:
    if asked.monitor is not None:
        return table.total_steps
    if asked.interval != "epoch":
        if table.total_steps is None:
            raise InvalidArgument(
                "lr_scheduler= needs to know the number of steps: give max_steps=…"
            )
        return table.total_steps
    if table.steps_per_epoch is None:
        if world_size > 1 or table.max_epochs is None:
            raise InvalidArgument(
                "LRSchedule(interval='epoch'): the data has no length, so nobody knows where its "
                "epochs end; step it by optimizer steps, with max_steps=…"
            )
        return table.max_epochs
    assert table.total_steps is not None
    return -(-table.total_steps // table.steps_per_epoch)

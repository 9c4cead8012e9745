"""When something is due: counts of optimizer steps, nothing that runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

LONGEST_SEGMENT = 1000
"""Steps between two borders at most, so that recorded losses stay few and Ctrl-C is near.

Where nothing else is due, every so many steps of the run are a border on all ranks, at which a rank
that wants to stop is heard.
"""


@dataclass(frozen=True)
class Timetable:
    """What is due when; every count is of optimizer steps.

    Attributes:
        accumulate: micro-batches a step.
        batches_per_epoch: on each rank, after limits; None where nobody knows.
        max_steps: the run ends here at the latest; None for the end of ``max_epochs``.
        max_epochs: None for the end of ``max_steps``.
        uneven: the last batch of an epoch is smaller, on some rank at least.
        log_every: steps between two logs; None for no logging.
        val_every_steps: steps of the run between two validations; None for the ends of epochs.
        val_in_epoch: steps of an epoch after which validation follows, in place of its end.
        val_every_epochs: epochs between two validations at their ends; None for never there.
        shift: steps that were made before resuming beyond those that the same epochs have now, on
            another number of processes or with another batch size.
    """

    accumulate: int = 1
    batches_per_epoch: int | None = None
    max_steps: int | None = None
    max_epochs: int | None = None
    uneven: bool = False
    log_every: int | None = None
    val_every_steps: int | None = None
    val_in_epoch: tuple[int, ...] = ()
    val_every_epochs: int | None = None
    shift: int = 0

    @cached_property
    def steps_per_epoch(self) -> int | None:
        """The last window of an epoch may be short; it is a step all the same."""
        if self.batches_per_epoch is None:
            return None
        return -(-self.batches_per_epoch // self.accumulate)

    @cached_property
    def total_steps(self) -> int | None:
        """Steps of the whole run."""
        per_epoch = self.steps_per_epoch
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.max_epochs is not None and per_epoch is not None:
            limits.append(self.max_epochs * per_epoch + self.shift)
        return min(limits) if limits else None

    @cached_property
    def last_window(self) -> int:
        """Micro-batches in the last window of an epoch of known length."""
        assert self.batches_per_epoch is not None
        return self.batches_per_epoch - (self.steps_per_epoch_known - 1) * self.accumulate

    @cached_property
    def steps_per_epoch_known(self) -> int:
        """``steps_per_epoch`` where the length is known."""
        assert self.steps_per_epoch is not None
        return self.steps_per_epoch

    def exchange_is_due(self, step: int) -> bool:
        """Whether the ranks exchange sums and wishes after ``step`` in any case."""
        ends = self.total_steps is not None and step >= self.total_steps
        return ends or step % LONGEST_SEGMENT == 0

    def log_is_due(self, step: int) -> bool:
        """Whether ``step`` is one after which metrics are logged."""
        return self.log_every is not None and step % self.log_every == 0

    def validation_is_due(self, step: int, epochs: int, in_epoch: int, *, epoch_end: bool) -> bool:
        """Whether validation follows ``step``.

        Args:
            step: of the run.
            epochs: complete by then.
            in_epoch: the same step, counted in its epoch.
            epoch_end: it is the last of its epoch.
        """
        if self.val_every_steps is not None:
            return step % self.val_every_steps == 0
        if self.val_in_epoch:
            running = epochs if epoch_end else epochs + 1
            return in_epoch in self.val_in_epoch and self._validates_in(running)
        return epoch_end and self._validates_in(epochs)

    def _validates_in(self, epoch: int) -> bool:
        """Whether epoch number ``epoch``, counted from 1, is one with validation."""
        return bool(self.val_every_epochs and epoch % self.val_every_epochs == 0)

    def next_due(self, step: int, others: Iterable[int | None]) -> int:
        """The next step after ``step`` at which something is due."""
        marks = [mark for mark in others if mark is not None and mark > step]
        periods = LONGEST_SEGMENT, self.log_every, self.val_every_steps
        marks += [(step // every + 1) * every for every in periods if every]
        if self.total_steps is not None:
            marks.append(self.total_steps)
        return min(marks)


class Segment(NamedTuple):
    """Steps between two borders.

    Attributes:
        num_steps: optimizer steps.
        size: micro-batches in each of its windows.
        last: the short or uneven window at the end of an epoch.
    """

    num_steps: int
    size: int
    last: bool = False


def next_segment(
    table: Timetable, step: int, steps_in_epoch: int, others: Iterable[int | None]
) -> Segment | None:
    """The steps until the next border, or None at the end of the run."""
    total = table.total_steps
    if total is not None and step >= total:
        return None
    within = [step + mark - steps_in_epoch for mark in table.val_in_epoch]
    num_steps = table.next_due(step, [*others, *within]) - step
    per_epoch = table.steps_per_epoch
    if per_epoch is None:
        return Segment(num_steps, table.accumulate)
    left = per_epoch - steps_in_epoch
    if not table.uneven and table.last_window == table.accumulate:
        return Segment(min(num_steps, left), table.accumulate)
    if left == 1:
        return Segment(1, table.last_window, last=True)
    return Segment(min(num_steps, left - 1), table.accumulate)

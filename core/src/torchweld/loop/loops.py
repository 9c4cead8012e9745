"""The inner loops: all that happens between two borders, with everything bound beforehand.

Each is written out by hand and chosen once. A feature that is off is not in the loop; nothing
here waits for the device, and the only communication is the strategy's own. Measured above the
same loop written bare: +2 Python calls a step (plain), see benchmarks/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

Compute = Callable[[Any], Tensor]
Record = Callable[[Tensor], Any]


def train_plain(
    batches: Iterator[Any],
    num_steps: int,
    *,
    compute: Compute,
    backward: Callable[[Tensor], None],
    step: Callable[[], Any],
    record: Record,
) -> None:
    """One batch, one step.

    Args:
        num_steps: optimizer steps until the next border.
        compute: ``batch -> loss``, a scalar on the device.
        record: takes the detached loss; a list's ``append``.
    """
    for batch in islice(batches, num_steps):
        loss = compute(batch)
        backward(loss)
        step()
        record(loss.detach())


def train_windows(
    batches: Iterator[Any],
    num_steps: int,
    *,
    size: int,
    window: Callable[[bool, int], None],
    compute: Compute,
    backward: Callable[[Tensor], None],
    step: Callable[[], Any],
    record: Record,
) -> None:
    """``size`` micro-batches a step.

    Args:
        window: told before forward of the first and of the last micro-batch, because that is
            where DDP decides whether it will exchange gradients.
    """
    for _ in range(num_steps):
        window(size == 1, size)
        for batch in islice(batches, size - 1):
            loss = compute(batch)
            backward(loss)
            record(loss.detach())
        window(True, size)
        for batch in islice(batches, 1):
            loss = compute(batch)
            backward(loss)
            step()
            record(loss.detach())


def train_closure(
    batches: Iterator[Any],
    num_steps: int,
    *,
    compute: Compute,
    backward: Callable[[Tensor], None],
    step_closure: Callable[[Callable[[], Tensor]], Any],
    record: Record,
) -> None:
    """One batch, one step of an optimizer that evaluates the loss itself, perhaps several times."""
    for batch in islice(batches, num_steps):
        first: list[Tensor] = []

        def closure(batch: Any = batch, first: list[Tensor] = first) -> Tensor:
            loss = compute(batch)
            backward(loss)
            first.append(loss.detach())
            return loss

        step_closure(closure)
        record(first[0])


def train_weighted(
    next_weighed: Callable[[], tuple[Any, float]],
    size: int,
    *,
    window: Callable[[bool, int], None] | None,
    compute: Compute,
    backward: Callable[[Tensor], None],
    step: Callable[[], Any],
    record: Record,
) -> None:
    """The short or uneven window at the end of an epoch; at most once an epoch.

    Args:
        next_weighed: reads a batch, and the weight with which the mean over the ranks of their
            losses is the mean over all samples of the global batch.
        size: micro-batches in this window.
    """
    for place in range(size):
        if window is not None and place in {0, size - 1}:
            window(place == size - 1, size)
        batch, weight = next_weighed()
        loss = compute(batch)
        backward(loss * weight if weight != 1.0 else loss)
        record(loss.detach())
    step()

"""What ``fit`` does between two borders: the inner loop that suits the run, chosen once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torchweld.loop.loops import train_closure, train_plain, train_weighted, train_windows
from torchweld.loop.timetable import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from torchweld.loop.run import TrainingRun


class FitLoop:
    """Trains segment by segment."""

    def __init__(self, run: TrainingRun, compute: Callable[[Any], Tensor]) -> None:
        self._run, self._wiring = run, run.wiring
        self._bound: dict[str, Any] = {
            "compute": compute,
            "backward": run.wiring.prepared.backward,
            "record": run.wiring.recorder.losses.append,
        }
        self._is_closure = run.wiring.is_closure
        if self._is_closure:
            self._bound["step_closure"] = run.wiring.advance_closure()
        else:
            self._bound["step"] = run.wiring.advance()
        self._inner = self._choose()

    def _choose(self) -> Callable[[Iterator[Any], int], None]:
        if self._is_closure:
            return partial(train_closure, **self._bound)
        size, window = self._wiring.table.accumulate, self._wiring.prepared.window
        if size > 1 and window is not None:
            return partial(train_windows, size=size, window=window, **self._bound)
        return partial(train_plain, **self._bound)

    def train(self) -> None:
        """Run to the end."""
        run = self._run
        while (segment := run.next_segment()) is not None:
            if segment.last:
                self._train_last_window(segment)
            elif self._wiring.feed.num_batches is None:
                self._train_unknown_length(segment)
            else:
                self._train_segment(segment)
            run.borders.work(weighed=segment.last)

    def _train_segment(self, segment: Segment) -> None:
        feed, position = self._wiring.feed, self._run.position
        self._inner(feed.batches, segment.num_steps)
        if len(self._wiring.recorder.losses) < segment.num_steps * segment.size:
            raise feed.short_error()
        position.step += segment.num_steps
        position.steps_in_epoch += segment.num_steps
        position.batch += segment.num_steps * segment.size

    def _train_unknown_length(self, segment: Segment) -> None:
        """Step by step, so that the end of an epoch is seen at the next end of a window."""
        feed, position, inner = self._wiring.feed, self._run.position, self._inner
        epoch = feed.epoch
        for _ in range(segment.num_steps):
            inner(feed.batches, 1)
            position.step += 1
            if feed.epoch > epoch:
                break
        position.batch = feed.batch

    def _train_last_window(self, segment: Segment) -> None:
        run = self._run
        run.weigher.restart()
        next_weighed = partial(self._wiring.feed.next_weighed, run.weigher.weigh)
        if self._is_closure:
            self._one_closure_step(*next_weighed())
        else:
            window = self._wiring.prepared.window
            train_weighted(next_weighed, segment.size, window=window, **self._bound)
        run.position.step += 1
        run.position.steps_in_epoch += 1
        run.position.batch += segment.size

    def _one_closure_step(self, batch: Any, weight: float) -> None:
        compute = self._bound["compute"]
        bound = {
            **self._bound,
            "compute": lambda b: compute(b) * weight,
            "record": lambda loss: self._bound["record"](loss / weight if weight else loss),
        }
        train_closure(iter([batch]), 1, **bound)

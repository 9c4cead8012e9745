"""The own loop: batches handed out one by one, with every misuse an error.

Without the guard each of these trains wrongly without a word, by 1e-3 to 1e-2 in a step, or lets
ranks drift apart: a second step for a batch, none, a step without a backward, a batch left out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from torchweld.errors import LoopError
from torchweld.loop.handle import NOT_THE_RUNS_MODEL
from torchweld.loop.timetable import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from torchweld.loop.run import TrainingRun

_STEPPED, _HANDED_OUT, _BACKWARD_BEGUN, _BACKWARD_DONE = range(4)
_END = object()
_FAILED = (
    "run.backward(loss) failed and left a part of its gradients, which would be added to the next: "
    "the run cannot go on after it"
)


class OwnLoop:
    """Hands out batches; segment and window belong to the run, so a ``break`` loses nothing.

    Args:
        backward: gradients of one batch.
        advance: the optimizer step at the end of a window.
    """

    def __init__(
        self, run: TrainingRun, backward: Callable[[Tensor], None], advance: Callable[[], Any]
    ) -> None:
        self._run = run
        self._backward, self._advance = backward, advance
        self._losses = run.wiring.recorder.losses
        self._handle, self._bare = run.wiring.handle, run.wiring.forward_is_bare
        self._segment: Segment | None = None
        self._left = 0  # batches until the next border
        self._size = 1  # micro-batches of the running window
        self._place = 0  # of the next batch in it
        self._weight = 1.0  # of the loss of the last batch
        self._state = _STEPPED
        self._iterating: Generator[Any, None, None] | None = None

    @property
    def in_window(self) -> bool:
        """Whether gradients are waiting for a step."""
        return self._place > 0 or self._state == _BACKWARD_DONE

    @property
    def weight(self) -> float:
        """What the loss of the last batch counts, where batches are uneven."""
        return self._weight

    @property
    def is_first(self) -> bool:
        """Whether the last batch begins a window; before its step."""
        return self._place == 0

    @property
    def is_last(self) -> bool:
        """Whether the last batch ends its window; before its step."""
        return self._place == self._size - 1

    @property
    def begins_segment(self) -> bool:
        """Whether the last batch is the first after a border."""
        return not self._losses

    def batches(self) -> Iterator[Any]:
        """Batches up to the end of the run; the border work is done between two of them.

        Raises:
            LoopError: the batch before was not used with exactly one backward and one step.
        """
        if self._iterating is not None:
            self._iterating.close()
        self._iterating = self._hand_out()
        return self._iterating

    def _hand_out(self) -> Generator[Any, None, None]:
        window, feed = self._run.wiring.prepared.window, self._run.wiring.feed
        endless = feed.num_batches is None
        entered = True
        try:
            self._check_stepped()
            while self._left or self._open_segment():
                last_place = self._size - 1
                if window is not None and (entered or self._place in {0, last_place}):
                    window(self._place == last_place, self._size)
                entered = False
                if self._segment.last:  # type: ignore[union-attr]  # open by the loop's condition
                    batch, self._weight = feed.next_weighed(self._run.weigher.weigh)
                else:
                    batch = next(feed.batches, _END)
                    if batch is _END:
                        raise feed.short_error()
                self._state, self._handle.used = _HANDED_OUT, False
                yield batch
                if self._state != _STEPPED:
                    self._check_stepped()
                if endless and self._place == 0 and feed.epoch > self._run.position.epoch:
                    self._left = 0
        finally:
            # Left inside a window: what is done outside of it is synchronised again.
            if window is not None:
                window(True, self._size)

    def _open_segment(self) -> bool:
        """Do the work of the border that was reached, then open the next segment, if any."""
        self._close_segment()
        self._segment = self._run.next_segment()
        if self._segment is None:
            return False
        self._size = self._segment.size
        self._left = self._segment.num_steps * self._size
        self._weight = 1.0
        self._run.weigher.restart()
        return True

    def _close_segment(self) -> None:
        if self._segment is not None:
            weighed, self._segment, self._left = self._segment.last, None, 0
            self._run.borders.work(weighed=weighed)

    def _check_stepped(self) -> None:
        if self._state == _HANDED_OUT:
            raise LoopError(
                "the last batch was handed out and not used: every batch needs run.backward(loss) "
                "and run.step() before the next one is read (a prefetcher around run.batches(), a "
                "`continue` or a `break` before them leaves one out)"
            )
        if self._state == _BACKWARD_BEGUN:
            raise LoopError(_FAILED)
        if self._state == _BACKWARD_DONE:
            raise LoopError(
                "run.step() is missing after run.backward(loss): call it once for every batch, "
                "also inside an accumulation window, where it only counts"
            )

    def backward(self, loss: Tensor) -> None:
        """Gradients of one batch, scaled by the window.

        Raises:
            LoopError: there is no batch, or it had its backward already.
        """
        if self._state != _HANDED_OUT:
            raise LoopError(self._wrong_backward())
        if not (self._handle.used or self._bare):
            raise LoopError(NOT_THE_RUNS_MODEL)
        self._state = _BACKWARD_BEGUN
        self._backward(loss if self._weight == 1.0 else loss * self._weight)
        self._state = _BACKWARD_DONE
        self._losses.append(loss.detach())

    def _wrong_backward(self) -> str:
        if self._state == _BACKWARD_BEGUN:
            return _FAILED
        if self._state == _BACKWARD_DONE:
            return "run.backward(loss) was called twice for one batch: add the losses up before it"
        return "run.backward(loss) was called without a new batch of run.batches()"

    def step(self) -> None:
        """The optimizer step at the end of a window; inside one it only counts.

        Raises:
            LoopError: there was no backward since the last one.
        """
        if self._state != _BACKWARD_DONE:
            raise LoopError(
                "run.step() was called twice for one batch, or without run.backward(loss) before "
                "it: call each exactly once a batch"
            )
        self._state = _STEPPED
        self._left -= 1
        self._place += 1
        if self._place == self._size:
            self._place = 0
            self._advance()
            position, feed = self._run.position, self._run.wiring.feed
            position.step += 1
            position.steps_in_epoch += 1
            known = feed.num_batches is not None
            position.batch = position.batch + self._size if known else feed.batch

    def close(self) -> None:
        """End the iteration; the border that was reached, if any, is worked off.

        Raises:
            LoopError: the last batch had its backward and not its step.
        """
        if self._iterating is not None:
            self._iterating.close()
        if self._state == _BACKWARD_DONE:
            self._check_stepped()
        del self._run.weigher.seen[len(self._losses) :]  # of a batch that was read and not used
        if self._place:
            self._run.wiring.console.warn(
                f"the run ended inside an accumulation window: {self._place} of its {self._size} "
                "micro-batches were not applied"
            )
            self._place = 0  # what is saved now is the state after the last step
        if self._losses:
            self._close_segment()

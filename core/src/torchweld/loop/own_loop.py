"""The own loop: batches handed out one by one, with every misuse an error.

Without the guard each of these trains wrongly without a word, by 1e-3 to 1e-2 in a step, or lets
ranks drift apart: a second step for a batch, none, a step without a backward, a batch left out.

Between two borders batches come from iterators of ``itertools`` alone, so that reading one is no
Python call. How many were read is asked of one of these iterators when the next backward begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from operator import itemgetter, length_hint
from typing import TYPE_CHECKING, Any, NamedTuple

from torchweld.errors import LoopError
from torchweld.loop.handle import NOT_THE_RUNS_MODEL
from torchweld.loop.timetable import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from torchweld.loop.run import TrainingRun

_STEPPED, _BACKWARD_BEGUN, _BACKWARD_DONE = range(3)
_FAILED = (
    "run.backward(loss) failed and left a part of its gradients, which would be added to the next: "
    "the run cannot go on after it"
)
_NOT_USED = (
    "the last batch was handed out and not used: every batch needs run.backward(loss) and "
    "run.step() before the next one is read (a prefetcher around run.batches(), a `continue` or a "
    "`break` before them leaves one out)"
)
_NOT_STEPPED = (
    "run.step() is missing after run.backward(loss): call it once for every batch, also inside an "
    "accumulation window, where it only counts"
)
_batch_of = itemgetter(1)


class Place(NamedTuple):
    """Where a batch is in its run.

    Attributes:
        weight: what its loss counts, where batches are uneven.
        is_first: it begins a window.
        is_last: it ends one.
        begins_segment: it is the first after a border.
    """

    weight: float
    is_first: bool
    is_last: bool
    begins_segment: bool


class OwnLoop:
    """Hands out batches; segment and window belong to the run, so a ``break`` loses nothing.

    Args:
        backward: gradients of one batch.
        advance: the optimizer step at the end of a window.
        checks_use: refuse a batch with which ``run.model`` was not called.
    """

    def __init__(
        self,
        run: TrainingRun,
        backward: Callable[[Tensor], None],
        advance: Callable[[], Any],
        *,
        checks_use: bool = True,
    ) -> None:
        self._run = run
        self._backward, self._advance = backward, advance
        self._losses = run.wiring.recorder.losses
        self._handle = run.wiring.handle
        self._bare = run.wiring.forward_is_bare or not checks_use
        self._window = run.wiring.prepared.window
        self._endless = run.wiring.feed.num_batches is None
        self._told = False  # whether the strategy knows of the next micro-batch
        self._segment: Segment | None = None
        self._left = 0  # batches until the next border that had no step yet
        self._size = 1  # micro-batches of the running window
        self._place = 0  # of the next batch in it
        self._weight = 1.0  # of the loss of the last batch
        self._state = _STEPPED
        self._gate, self._ticks = iter(range(0)), iter(range(0))
        self._unread = partial(length_hint, self._ticks)
        self._runs: Generator[Iterable[Any], None, None] | None = None

    @property
    def in_window(self) -> bool:
        """Whether gradients are waiting for a step."""
        return self._place > 0 or self._state == _BACKWARD_DONE

    def place(self) -> Place:
        """Where the last batch is; before its step."""
        begins_segment = not self._losses
        return Place(self._weight, self._place == 0, self._place == self._size - 1, begins_segment)

    def batches(self) -> Iterator[Any]:
        """Batches up to the end of the run; the border work is done between two of them.

        Raises:
            LoopError: the batch before was not used with exactly one backward and one step.
        """
        self.interrupt()
        self.check_used()
        self._count_from_here()
        self._runs = self._in_runs()
        return chain.from_iterable(self._runs)

    def interrupt(self) -> None:
        """Let the iterator that was handed out last hand out nothing more."""
        if self._runs is not None:
            self._runs.close()
        deque(self._gate, maxlen=0)

    def _in_runs(self) -> Generator[Iterable[Any], None, None]:
        """Runs of batches, with nothing to do here between two batches of one."""
        feed = self._run.wiring.feed
        self._told = False
        try:
            while self._goes_on():
                if not self._told:
                    self._tell()
                if self._segment.last:  # type: ignore[union-attr]  # open while there are batches
                    batch, self._weight = feed.next_weighed(self._run.weigher.weigh)
                    yield self._guarded([batch], 1)
                    self.check_used()
                    continue
                # Without a length the end of an epoch is looked for after each window.
                length = self._size - self._place if self._endless else self._left
                before = self._unread()
                yield self._guarded(feed.batches, length)
                self.check_used()
                if before - self._unread() < length:
                    raise feed.short_error()
        finally:
            # Left inside a window: what is done outside of it is synchronised again.
            if self._window is not None:
                self._window(True, self._size)

    def _goes_on(self) -> bool:
        """Whether there is another batch; does the work of the border that was reached."""
        if self._endless and self._place == 0:
            self._told = False
            if self._run.wiring.feed.epoch > self._run.position.epoch:
                self._left = 0
        return self._left > 0 or self._open_segment()

    def _tell(self) -> None:
        """Tell the strategy of the next micro-batch, before its forward."""
        self._told = True
        if self._window is not None:
            self._window(self._place == self._size - 1, self._size)

    def _guarded(self, batches: Iterable[Any], length: int) -> Iterator[Any]:
        """Batches that are counted; none is read once the gate is closed."""
        return islice(map(_batch_of, zip(self._gate, batches, self._ticks, strict=False)), length)

    def _count_from_here(self) -> None:
        self._gate, self._ticks = iter(range(self._left)), iter(range(self._left))
        self._unread = partial(length_hint, self._ticks)

    def _open_segment(self) -> bool:
        """Do the work of the border that was reached, then open the next segment, if any."""
        self._close_segment()
        self._segment = self._run.next_segment()
        if self._segment is None:
            return False
        self._size = self._segment.size
        self._left = self._segment.num_steps * self._size
        self._weight, self._told = 1.0, False
        self._count_from_here()
        self._run.weigher.restart()
        return True

    def _close_segment(self) -> None:
        if self._segment is not None:
            weighed, self._segment, self._left = self._segment.last, None, 0
            self._run.borders.work(weighed=weighed)

    def check_used(self) -> None:
        """Refuse to go on without a step for each batch that was handed out.

        Raises:
            LoopError: one was not used, or not to its end.
        """
        if self._state == _BACKWARD_BEGUN:
            raise LoopError(_FAILED)
        if self._state == _BACKWARD_DONE:
            raise LoopError(_NOT_STEPPED)
        if self._unread() < self._left:
            raise LoopError(_NOT_USED)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one batch, scaled by the window.

        Raises:
            LoopError: there is no batch, or it had its backward already.
        """
        if self._state != _STEPPED or self._left - self._unread() != 1:
            raise LoopError(self._wrong_backward())
        if not (self._bare or self._handle.used):
            raise LoopError(NOT_THE_RUNS_MODEL)
        self._state = _BACKWARD_BEGUN
        self._backward(loss if self._weight == 1.0 else loss * self._weight)
        self._state = _BACKWARD_DONE
        self._losses.append(loss.detach())

    def _wrong_backward(self) -> str:
        waiting = self._left - self._unread()
        if self._state == _BACKWARD_BEGUN:
            return _FAILED
        if self._state == _BACKWARD_DONE:
            again = "run.backward(loss) was called twice for one batch: add the losses up before it"
            return again if waiting == 1 else _NOT_STEPPED
        if waiting > 0:
            return _NOT_USED
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
        if not self._bare:
            self._handle.used = False
        self._left -= 1
        self._place += 1
        if self._place == self._size:
            self._place = 0
            self._advance()
            position = self._run.position
            position.step += 1
            position.steps_in_epoch += 1
            if self._endless:
                position.batch = self._run.wiring.feed.batch
                return  # the next window may be of another epoch: the strategy is told there
            position.batch += self._size
        if self._window is not None and self._left and self._place in {0, self._size - 1}:
            self._window(self._place == self._size - 1, self._size)

    def close(self) -> None:
        """End the iteration; the border that was reached, if any, is worked off.

        Raises:
            LoopError: the last batch had its backward and not its step.
        """
        self.interrupt()
        if self._state == _BACKWARD_DONE:
            raise LoopError(_NOT_STEPPED)
        del self._run.weigher.seen[len(self._losses) :]  # of a batch that was read and not used
        if self._place:
            self._run.wiring.console.warn(
                f"the run ended inside an accumulation window: {self._place} of its {self._size} "
                "micro-batches were not applied"
            )
            self._place = 0  # what is saved now is the state after the last step
        if self._losses:
            self._close_segment()

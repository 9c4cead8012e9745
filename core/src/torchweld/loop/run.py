"""A run: what ``fit`` and an own loop are both written with, over the same borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchweld.callbacks import ModelCheckpoint
from torchweld.errors import InvalidArgument, LoopError, Preempted
from torchweld.interfaces import Env, Progress, Result
from torchweld.loop.averages import averaged, check_weights
from torchweld.loop.borders import Borders
from torchweld.loop.exporting import export_models, export_run
from torchweld.loop.fit_loop import FitLoop
from torchweld.loop.gathering import gather
from torchweld.loop.joint import Handles
from torchweld.loop.own_loop import OwnLoop
from torchweld.loop.saving import async_save_run, save_run
from torchweld.loop.several import SeveralLoop
from torchweld.loop.timetable import Segment, next_segment
from torchweld.loop.weighing import Weigher
from torchweld.processes.ending import EndAsked

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from torchweld.loop.handle import Handle
    from torchweld.loop.wiring import Wiring
    from torchweld.plan import Plan

_TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h: worth another try
_TERMINATED = 143  # 128 + SIGTERM, what a shell says of a process that a SIGTERM ended


@dataclass
class Position:
    """Where a run is; ``batch`` and ``steps_in_epoch`` are of the running epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    steps_in_epoch: int = 0
    samples: int = 0


class TrainingRun:
    """One training run; ``torchweld.interfaces.Run`` says what each name promises.

    ``batches``, ``backward`` and ``step`` are the own loop's, bound here so that a call is one
    call.

    Attributes:
        wiring: what the set-up made.
        position: where the run is.
        plan: with the facts of fit.
        where: what to say about the run when something fails.
        stopping: no further segment is begun.
        end_asked: a signal that asks the run to end at the next border.
        guard: entered around an own loop; tells the other ranks of an error here.
    """

    batches: Callable[[], Iterator[Any]]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    loss: Callable[[Any, Any], Any]
    models: Mapping[str, Handle]

    def __init__(self, wiring: Wiring, where: dict[str, Any]) -> None:
        self.position = Position()
        self.where = where
        self.stopping = False
        self.guard = ExitStack()
        self.end_asked = EndAsked()
        self._closed = False
        self.rewire(wiring)

    def rewire(self, wiring: Wiring) -> None:
        """Take the parts of the run; again once those that want the run have been bound to it."""
        self.wiring = wiring
        self.plan: Plan = wiring.plan
        self.weigher = Weigher(
            wiring.feed.loader, wiring.ranks.world_size, self.position, wiring.recorder
        )
        self.borders = Borders(self)
        self.model: Any
        self._own: OwnLoop | SeveralLoop
        self.model = handle = wiring.handle
        if isinstance(handle, Handles):
            self._own = SeveralLoop(self)
            self.models = {name: member.handle for name, member in wiring.members.items()}
            if len(self.models) == 1:
                (self.model,) = self.models.values()
        else:
            self._own = OwnLoop(self, wiring.prepared.backward, wiring.advance())
            self.models = {"model": handle}
            handle.backward, handle.step = self._own.backward, self._own.step
        self.batches, self.backward, self.step = (
            self._own.batches,
            self._own.backward,
            self._own.step,
        )
        self.loss = _bind_loss(wiring)

    @property
    def env(self) -> Env:
        """This process among the others."""
        return self.wiring.ranks.env

    @property
    def directory(self) -> Path | None:
        """Where this run writes; None where it writes nothing."""
        return self.wiring.directory

    @property
    def progress(self) -> Progress:
        """Counts up to now; samples up to the last border."""
        table, position = self.wiring.table, self.position
        return Progress(
            position.step,
            position.epoch,
            position.samples,
            table.steps_per_epoch,
            table.total_steps,
        )

    def train(self, compute: Callable[[Any], Tensor]) -> None:
        """Run to the end: inner loop, border, inner loop, and so on.

        Args:
            compute: ``batch -> loss``.
        """
        FitLoop(self, compute).train()
        self.close()

    def next_segment(self) -> Segment | None:
        """The steps until the next border; None when the run is over."""
        if self.stopping:
            return None
        position, feed = self.position, self.wiring.feed
        segment = next_segment(
            self.wiring.table, position.step, position.steps_in_epoch, self.borders.marks()
        )
        if segment is not None:
            self.where["doing"] = f"step {position.step + 1}"
            if not feed.is_open(position.epoch):
                feed.start(position.epoch)
        return segment

    def result(self) -> Result:
        """What there is to say about the run now."""
        savers = [c for c in self.wiring.callbacks if isinstance(c, ModelCheckpoint)]
        last = max(
            (s.last for s in savers if s.last),
            key=lambda path: int(path.name.partition("-")[2]),
            default=None,
        )
        best = next((s.best for s in savers if s.monitor is not None), None)
        return Result(
            dict(self.borders.metrics), self.progress, last, self.plan, best, self.directory
        )

    # ---- at any time -----------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Keep scalars until the next border, which logs their means over all samples."""
        self.wiring.recorder.note(metrics)

    def say(self, line: str) -> None:
        """Print a line on rank 0, above the bar."""
        self.wiring.console.say(line)

    def evaluate(self, data: Any = None) -> Mapping[str, float]:
        """Evaluate on ``data``, one set or a mapping, or on ``val=``; every rank must call it."""
        return self.borders.evaluate(data)

    def gather(self, value: Any) -> Any:
        """Return the values of all ranks, stacked along a new first dimension, without gradients.

        Every rank must call it, with a number or a tensor of the same shape and dtype.

        Raises:
            RanksDisagree: shapes or dtypes are not the same; on all ranks.
        """
        return gather(self.wiring.ranks, value)

    def save(self) -> Path:
        """Write a checkpoint now; every rank must call it.

        Raises:
            LoopError: inside an accumulation window, or between backward and step.
        """
        self._check_savable()
        return save_run(self)

    def async_save(self) -> Future[Path]:
        """Copy the state to the CPU now and write it beside the next steps; every rank calls it.

        It waits for the checkpoint before, if that is still being written. A failure in the thread
        ends the run on all ranks at the next border, also if nobody asks the future. The future
        is done on every rank in another moment: nothing that all must do alike may depend on it.

        Raises:
            LoopError: inside an accumulation window, or between backward and step.
        """
        self._check_savable()
        return async_save_run(self)

    def _check_savable(self) -> None:
        if self._own.in_window:
            raise LoopError(
                "run.save() was called inside an accumulation window: half a gradient cannot be "
                "saved; call it after the window's last run.step()"
            )

    def export(self, path: str | Path, *, weights: str = "trained") -> Path:
        """Write the consolidated weights as one safetensors file; every rank must call it.

        With ``weights="average"`` it is the average that a surgery keeps.

        Of several models ``path`` is a directory with one file each: ``path/<name>.safetensors``.
        """
        export = export_models if self.wiring.members else export_run
        average = check_weights(weights)
        with averaged(self.wiring) if average else nullcontext():
            return export(self.wiring, path, in_use=average)

    def stop(self) -> None:
        """End the run at the next border, on all ranks."""
        self.borders.stop_asked = True

    def close(self) -> None:
        """Do the border work that is still pending, and the last border's.

        Raises:
            Preempted: a signal has ended the run; on all ranks, once everything is done.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._own.close()
            self.borders.finish()
        except BaseException as error:
            self._fail(error)
            raise
        self.guard.close()
        if self.borders.preempted:
            raise Preempted(_TEMPORARY_FAILURE if self.wiring.directory else _TERMINATED)

    def __enter__(self) -> TrainingRun:  # noqa: PYI034 - Self is in typing from 3.11 on
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        self._closed = True
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.borders.abandon(error)
        self.guard.__exit__(type(error), error, error.__traceback__)


def _bind_loss(wiring: Wiring) -> Callable[[Any, Any], Any]:
    """The loss itself where nothing comes before it."""
    loss, transforms = wiring.loss, wiring.parts.target_transforms

    def missing(_outputs: Any, _targets: Any) -> Any:
        raise InvalidArgument("run.loss was called, but no loss= was given")

    def transformed(outputs: Any, targets: Any) -> Any:
        for transform in transforms:
            targets = transform(outputs, targets)
        return loss(outputs, targets)  # type: ignore[misc]  # not None where this is returned

    if loss is None:
        return missing
    return transformed if transforms else loss

"""Supervise the workers of a conversion: none may fail, die or live on unheard.

FFCV's own writer waits for ever when a worker raises or dies (ffcv 1.0.2).
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, cast

from torchweld.guard import attempt, one_line
from torchweld_ffcv.errors import ConversionError
from torchweld_ffcv.interrupts import Interrupts
from torchweld_ffcv.pages import Piece
from torchweld_ffcv.worker import Failure, Finished, Job, Task, pickled, work


class WorkerTraceback(Exception):
    """The traceback of an error in a worker, as the cause of what is raised here."""


class WorkerFailed(Exception):
    """A worker reported a failure or died.

    Attributes:
        failure: what it said, or what its end looked like.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Task | None = None  # what it is doing


@dataclass
class Workers:
    """Worker processes; leaving the context ends those that still run, at once.

    Attributes:
        job: what they all do.
        count: how many.
        interrupts: of this conversion.
    """

    job: Job
    count: int
    interrupts: Interrupts
    _all: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> Workers:  # noqa: PYI034 - Self is in typing from Python 3.11 on
        """Start them. They are forked, as those of a DataLoader, so any dataset will do."""
        try:
            with self.interrupts.deferred():
                for _ in range(self.count):
                    self._all.append(_started(self.job))
        except BaseException:  # a Ctrl-C that came meanwhile, or no more processes to be had
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill what still runs: a worker owns nothing that it would have to put away."""
        for worker in self._all:
            if worker.process.is_alive():
                worker.process.kill()
        for worker in self._all:
            worker.process.join()
            worker.process.close()
            worker.connection.close()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Piece]]:
        """Do all tasks; yields ``(start, piece)`` in the order in which they get done.

        Raises:
            WorkerFailed: the first failure.
        """
        waiting = iter(tasks)
        idle, busy = list(self._all), cast("list[_Worker]", [])
        while True:
            self.interrupts.check()
            while idle and (task := next(waiting, None)) is not None:
                self._give(idle[-1], task)
                busy.append(idle.pop())
            if not busy:
                return
            for worker in _ready(busy):
                start = worker.task.start if worker.task else 0
                yield start, cast("Piece", self._answer(worker))
                busy.remove(worker)
                idle.append(worker)

    def finish(self) -> list[tuple[int, int, int]]:
        """Let all write what they still hold; returns the regions of the file by offset.

        Raises:
            WorkerFailed: one could not.
        """
        for worker in self._all:
            self._give(worker, None)
        finished = [cast("Finished", self._answer(worker)) for worker in self._all]
        for worker in self._all:
            worker.process.join()
        return sorted(segment for one in finished for segment in one.segments)

    def _give(self, worker: _Worker, task: Task | None) -> None:
        data = attempt(pickled, task)
        if data.value is None:
            which = f"{task.start} to {task.stop - 1}" if task else ""
            reason = one_line(data.error) if data.error else ""
            raise ConversionError(f"samples {which} cannot be sent to a worker process: {reason}")
        worker.task = task
        try:
            worker.connection.send_bytes(data.value)
        except OSError:
            raise WorkerFailed(_end_of(worker)) from None

    def _answer(self, worker: _Worker) -> Any:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            raise WorkerFailed(_end_of(worker)) from None
        if isinstance(answer, Failure):
            raise WorkerFailed(answer)
        return answer


def _started(job: Job) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(job, theirs), daemon=True)
    with warnings.catch_warnings():
        # From Python 3.12 on a warning in every process with threads, as torch has; a worker takes
        # no lock that one of those could hold, and uses one thread.
        warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
        process.start()
    theirs.close()  # the worker's end is then closed when the worker has died
    return _Worker(process, ours)


def _ready(busy: list[_Worker]) -> list[_Worker]:
    ready = wait([worker.connection for worker in busy])
    return [worker for worker in busy if worker.connection in ready]


def _end_of(worker: _Worker) -> Failure:
    """How a worker died that said nothing."""
    worker.process.join(timeout=5)
    code = worker.process.exitcode
    where = f" at samples {worker.task.start} to {worker.task.stop - 1}" if worker.task else ""
    if code is None or code >= 0:
        return Failure(f"a worker process left with exit code {code}{where}")
    name = attempt(lambda: signal.Signals(-code).name).value or f"signal {-code}"
    memory = "; out of memory? try fewer workers" if name == "SIGKILL" else ""
    return Failure(f"a worker process was ended by {name}{where}{memory}")

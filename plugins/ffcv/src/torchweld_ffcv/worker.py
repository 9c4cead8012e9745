"""What one worker process of a conversion does: read samples, check, encode, write pages."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from torchweld.guard import attempt, one_line
from torchweld_ffcv.errors import ValueRefused
from torchweld_ffcv.layout import ALLOCATION
from torchweld_ffcv.pages import Counter, PageWriter, Piece, WriteFailed
from torchweld_ffcv.samples import SampleFields

_PARENT_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """What every worker of a conversion gets.

    Attributes:
        read: sample by index; None where samples are sent.
        fields: how a sample is encoded.
        path: of the file that is being written; if it is there, removed when the parent dies.
        fd: of that file.
        end: where the next free page begins.
        skip_bad: leave bad samples out instead of stopping.
        parent: process id.
    """

    read: Callable[[int], Any] | None
    fields: SampleFields
    path: Path
    fd: int
    end: Counter
    skip_bad: bool
    parent: int


@dataclass(frozen=True)
class Task:
    """Samples ``start`` to ``stop``; with ``samples``, these are they."""

    start: int
    stop: int
    samples: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Failure:
    """Why a worker gave up.

    Attributes:
        reason: one line.
        sample: whose fault it was, or None.
        trace: the traceback in the worker.
    """

    reason: str
    sample: int | None = None
    trace: str = ""


@dataclass(frozen=True)
class Finished:
    """The last word of a worker: the regions of the file that it has written."""

    segments: list[tuple[int, int, int]]


class BadSample(Exception):
    """A sample could not be read or does not fit the fields."""

    def __init__(self, index: int, reason: str, trace: str) -> None:
        super().__init__(reason)
        self.failure = Failure(reason, index, trace)


def work(job: Job, connection: Connection) -> None:
    """Answer every task with a piece, None with the segments; the first fault ends the worker."""
    _become_worker(job)
    writer = PageWriter(job.fd, job.end)
    while True:
        task = pickle.loads(connection.recv_bytes())  # of our own parent
        if task is None:
            written = attempt(writer.flush)
            answer = _failure(written.error) if written.error else Finished(writer.segments)
            connection.send(answer)
            return
        done = attempt(convert_piece, job, writer, task)
        if done.error is not None:
            connection.send(_failure(done.error))
            return
        connection.send(done.value)


def convert_piece(job: Job, writer: PageWriter, task: Task) -> Piece:
    """Write the samples of one task.

    Raises:
        BadSample: of the first bad one, unless they are skipped.
        WriteFailed: the file cannot be written.
    """
    piece = _OpenPiece(job.fields, writer)
    for index in range(task.start, task.stop):
        piece.try_sample(job, task, index)
    return piece.closed()


@dataclass
class _OpenPiece:
    fields: SampleFields
    writer: PageWriter
    rows: list[Any] = field(default_factory=list)
    allocations: list[tuple[int, int, int]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def try_sample(self, job: Job, task: Task, index: int) -> None:
        try:
            self._add(_read(job, task, index), index)
        except BadSample as bad:
            if not job.skip_bad:
                raise
            self.skipped.append((index, str(bad)))

    def _add(self, sample: Any, index: int) -> None:
        regions: list[tuple[int, int, int]] = []
        number, writer = len(self.rows), self.writer

        def put(data: Any) -> int:
            pointer = writer.put(data)
            regions.append((number, pointer, memoryview(data).nbytes))
            return pointer

        try:
            row = self.fields.encode(sample, put)
        except ValueRefused as error:
            raise BadSample(index, str(error), "") from error
        self.rows.append(row)
        self.allocations += regions

    def closed(self) -> Piece:
        rows = np.zeros(len(self.rows), self.fields.metadata_dtype)
        for position, column in enumerate(rows.dtype.names or ()):
            values = [row[position] for row in self.rows]
            rows[column] = np.array(values, rows.dtype[column])
        return Piece(rows, np.array(self.allocations, ALLOCATION), tuple(self.skipped))


def _read(job: Job, task: Task, index: int) -> Any:
    if task.samples is not None:
        return task.samples[index - task.start]
    if job.read is None:
        raise TypeError("this dataset has no indices and its samples were not sent")
    sample = attempt(job.read, index)
    if sample.error is not None:
        trace = "".join(traceback.format_exception(sample.error))
        raise BadSample(index, one_line(sample.error), trace)
    return sample.value


def _failure(error: BaseException) -> Failure:
    if isinstance(error, BadSample):
        return error.failure
    if isinstance(error, WriteFailed):
        return Failure(str(error))
    return Failure(one_line(error), None, "".join(traceback.format_exception(error)))


# ---- being a worker ----------------------------------------------------------------------------


def _become_worker(job: Job) -> None:
    # Ctrl-C reaches the whole group; the parent decides what ends, and ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # SLURM's --signal=USR1 reaches every process of a step and means the training, not this one.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(job,), daemon=True).start()
    _use_one_thread(sys.modules)


def _leave_with_parent(job: Job) -> None:
    """End this process when the parent has died, and take the unfinished file along."""
    while os.getppid() == job.parent:
        time.sleep(_PARENT_POLL_SECONDS)
    job.path.unlink(missing_ok=True)
    os._exit(1)


def _use_one_thread(loaded: Any) -> None:
    # The threads of torch's and OpenCV's pools did not come along; waiting for one would be for
    # ever. With a single one, no pool is used.
    if "torch" in loaded:
        loaded["torch"].set_num_threads(1)
    if "cv2" in loaded:
        loaded["cv2"].setNumThreads(0)


def pickled(task: Task | None) -> bytes:
    """A task as bytes. Not torch's way, which puts tensors into shared memory."""
    return pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL)


def tasks_of(samples: Iterable[Any], size: int) -> Iterable[Task]:
    """Group samples of unknown number into tasks."""
    start, group = 0, []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield Task(start, start + size, tuple(group))
            start, group = start + size, []
    if group:
        yield Task(start, start + len(group), tuple(group))

"""Convert a dataset into a ``.beton`` file on all cores: whole, or not at all."""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from torchweld.errors import InvalidArgument
from torchweld.guard import attempt
from torchweld_ffcv import layout
from torchweld_ffcv.beginning import FIRST, check_repeatable, random_state_kept, read_beginning
from torchweld_ffcv.errors import ConversionError
from torchweld_ffcv.finishing import joined, make_room, write_tables
from torchweld_ffcv.interrupts import Interrupts
from torchweld_ffcv.kinds import Kind
from torchweld_ffcv.pages import Piece, WriteFailed
from torchweld_ffcv.samples import SampleFields, find_fields
from torchweld_ffcv.sources import Source
from torchweld_ffcv.target import OpenFile, check_place, new_file
from torchweld_ffcv.worker import Job, Task, tasks_of
from torchweld_ffcv.workers import WorkerFailed, Workers, WorkerTraceback

_LARGEST_TASK = 128  # samples; large enough that a worker is asked rarely
_SENT_TASK = 16  # samples of an iterable, which are held in memory while they travel
_LISTED_SKIPS = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        path: of the file.
        num_samples: in the file.
        num_bytes: its size.
        skipped: ``(index in the dataset, why)`` of samples that were left out.
        seconds: how long it took.
    """

    path: Path
    num_samples: int
    num_bytes: int
    skipped: tuple[tuple[int, str], ...]
    seconds: float


@dataclass(frozen=True)
class Wishes:
    """How to convert; :func:`torchweld_ffcv.convert` documents them."""

    fields: Mapping[str, Kind] | None = None
    workers: int | None = None
    skip_bad: bool = False
    allow_random: bool = False
    progress: bool = False
    fingerprint: str | None = None
    pictures: Mapping[str, Any] | None = None  # other options of the kind Image where it is found


def convert_source(source: Source, path: Path, wishes: Wishes) -> Converted:
    """Write ``source`` to ``path``.

    Raises:
        ConversionError: a sample, a worker or the disk failed; nothing was left at ``path``.
        InvalidArgument: ``source`` is empty.
    """
    started = time.monotonic()
    count = min(_worker_count(wishes.workers), source.length or available_cores())
    check_place(path)
    with Interrupts() as interrupts:
        with random_state_kept():
            beginning = read_beginning(source, skip_bad=wishes.skip_bad)
            fields = _fields_of(source, beginning.first, wishes)
            if not wishes.allow_random:
                check_repeatable(source, fields, beginning)
        # Not earlier: what removes the file when this process is killed are the workers.
        with new_file(path) as file:
            writing = _Writing(source, fields, file, wishes)
            skipped = writing.run(count, beginning.all, interrupts)
    num_bytes, seconds = path.stat().st_size, time.monotonic() - started
    return Converted(path, writing.num_samples, num_bytes, skipped, seconds)


class _Writing:
    """One conversion under way."""

    def __init__(
        self, source: Source, fields: SampleFields, file: OpenFile, wishes: Wishes
    ) -> None:
        self.source, self.fields, self.file, self.wishes = source, fields, file, wishes
        self.num_samples = 0
        rows = (source.length or 0) * fields.metadata_dtype.itemsize
        self._front = layout.metadata_offset(len(fields.names))
        self._begin = layout.align(self._front + rows, layout.PAGE_BYTES)

    def run(
        self, count: int, samples: Iterator[Any] | None, interrupts: Interrupts
    ) -> tuple[tuple[int, str], ...]:
        """Write everything; returns what was skipped."""
        tasks = _tasks(self.source, count, samples)
        try:
            pieces, segments = self._pieces(count, tasks, interrupts)
            skipped = tuple(bad for piece in pieces for bad in piece.skipped)
            self._finish(pieces, segments, skipped)
            self.file.publish()
        except WorkerFailed as error:
            failure = error.failure
            message = self._message(failure.reason, failure.sample)
            raise ConversionError(message, failure.sample) from WorkerTraceback(failure.trace)
        except WriteFailed as error:
            raise ConversionError(self._message(str(error), None)) from error
        return skipped

    def _pieces(
        self, count: int, tasks: Iterable[Task], interrupts: Interrupts
    ) -> tuple[list[Piece], list[tuple[int, int, int]]]:
        end = multiprocessing.get_context("fork").Value("Q", self._begin)
        job = Job(
            read=self.source.read,
            fields=self.fields,
            path=self.file.path,
            fd=self.file.fd,
            end=end,
            skip_bad=self.wishes.skip_bad,
            parent=os.getpid(),
        )
        done: dict[int, Piece] = {}
        bar = _progress(self.source, self.wishes)
        with Workers(job, count, interrupts) as workers, bar as advance:
            for start, piece in workers.run(tasks):
                done[start] = piece
                advance(len(piece.rows) + len(piece.skipped))
            segments = workers.finish()
        return [done[start] for start in sorted(done)], segments

    def _finish(
        self,
        pieces: list[Piece],
        segments: list[tuple[int, int, int]],
        skipped: tuple[tuple[int, str], ...],
    ) -> None:
        if not any(len(piece.rows) for piece in pieces):
            first = "; the first: " + skipped[0][1] if skipped else ""
            raise ConversionError(self._message(f"all {len(skipped)} samples are bad{first}", None))
        tables = joined(pieces, segments)
        needed = self._front + tables.rows.nbytes
        if needed > self._begin:
            make_room(self.file.fd, tables, _pointers(self.fields), needed)
        data = _manifest(self.source, self.fields, self.wishes, skipped)
        begin = max(self._begin, layout.align(needed, layout.PAGE_BYTES))
        write_tables(self.file.fd, tables, self.fields, data, begin)
        self.num_samples = len(tables.rows)

    def _message(self, reason: str, sample: int | None) -> str:
        place = self.file.place
        left = "the older file is as it was" if place.exists() else "nothing was left there"
        if sample is None:
            return f"{self.source.label} could not be written to {place}: {reason}; {left}"
        total = f" of {self.source.length}" if self.source.length is not None else ""
        which = f"sample {sample}{total}{self.source.describe(sample)}"
        return (
            f"{which} could not be written to {place}: {reason}; {left} "
            "(skip_bad=True leaves such samples out and lists them)"
        )


# ---- before ------------------------------------------------------------------------------------


def _worker_count(wished: int | None) -> int:
    available = available_cores()
    if wished is None:
        return available
    if wished < 1:
        raise InvalidArgument(f"workers={wished} is no number of processes > 0")
    if wished > available:
        log.warning("%d workers asked, this process may use %d cores", wished, available)
    return min(wished, available)


def available_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fields_of(source: Source, first: Sequence[Any], wishes: Wishes) -> SampleFields:
    if wishes.skip_bad:
        good = [one for one in first if attempt(find_fields, [one], wishes.fields).error is None]
        first = good or first
    if not first:
        raise ConversionError(
            f"{source.label}: none of the first {FIRST} samples can be read, so there is nothing "
            "to find the fields from"
        )
    return find_fields(first, wishes.fields, names=source.names, pictures=wishes.pictures or {})


# ---- around the workers ------------------------------------------------------------------------


def _tasks(source: Source, count: int, samples: Iterator[Any] | None) -> Iterable[Task]:
    if samples is not None:
        return tasks_of(samples, _SENT_TASK)
    length = source.length or 0
    size = min(_LARGEST_TASK, max(1, length // (4 * count)))
    return (Task(start, min(start + size, length)) for start in range(0, length, size))


def _progress(source: Source, wishes: Wishes) -> AbstractContextManager[Callable[[int], object]]:
    if not wishes.progress:
        return nullcontext(lambda _: None)
    return _Bar(source)


class _Bar:
    """tqdm's bar on standard error."""

    def __init__(self, source: Source) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=source.length, unit=" samples", desc="ffcv: converting")

    def __enter__(self) -> Callable[[int], object]:
        update: Callable[[int], object] = self._bar.update
        return update

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def _pointers(fields: SampleFields) -> list[tuple[str, str]]:
    columns = fields.metadata_dtype.names or ()
    return [
        (column, layout.POINTER[one.type_id])
        for column, one in zip(columns, fields.encoders, strict=True)
        if one.type_id in layout.POINTER
    ]


def _manifest(
    source: Source, fields: SampleFields, wishes: Wishes, skipped: tuple[tuple[int, str], ...]
) -> dict[str, Any]:
    return {
        "format": 1,
        "versions": {
            "torchweld-ffcv": version("torchweld-ffcv"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "source": source.label,
        "fingerprint": wishes.fingerprint,
        "container": fields.container,
        "fields": fields.described(),
        "num_skipped": len(skipped),
        "skipped": [list(bad) for bad in skipped[:_LISTED_SKIPS]],
    }

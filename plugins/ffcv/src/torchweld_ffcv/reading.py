"""Batches of a ``.beton`` file: their rows are shared among threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from torchweld_ffcv.beton import Beton
from torchweld_ffcv.columns import FileData, Rows, field_readers
from torchweld_ffcv.contract import BatchContract
from torchweld_ffcv.memory import Recycler
from torchweld_ffcv.spec import Spec


@dataclass(frozen=True)
class Pending:
    """A batch that is being read."""

    futures: Sequence[Future[Any]]
    finish: Callable[[], Any]

    def result(self) -> Any:
        """Wait for it; an error in a thread is raised here."""
        for future in self.futures:
            future.result()
        return self.finish()

    def cancel(self) -> None:
        """Leave out what has not begun."""
        for future in self.futures:
            future.cancel()


class SpecReader:
    """Reads batches as a spec says.

    Args:
        spec: for every field of the file.
        num_threads: that read; a batch is cut into as few parts as keep all of them busy.
        batches_ahead: batches that are read at the same time.
    """

    owns_batches = True

    def __init__(self, beton: Beton, spec: Spec, *, num_threads: int, batches_ahead: int) -> None:
        self._num_parts = math.ceil(num_threads / batches_ahead)
        self._data = FileData(beton)
        self._memory = Recycler(batches_ahead + 2)
        self._readers = field_readers(beton, spec, self._data, self._memory)
        names = tuple(reader.contract.name for reader in self._readers)
        self._form = _form(beton.container, len(names))
        self._names = names
        self.contract = BatchContract(tuple(r.contract for r in self._readers), self._form)

    def submit(self, pool: Executor, rows: Rows) -> Pending:
        """Begin to read a batch."""
        count = len(rows.numbers)
        rooms = [reader.allocate(count) for reader in self._readers]
        parts = _parts(count, self._num_parts)
        futures = [pool.submit(self._fill, rows.part(part), rooms, part) for part in parts]
        return Pending(futures, lambda: self._assemble(rooms))

    def _fill(self, rows: Rows, rooms: Sequence[Any], part: slice) -> None:
        for reader, room in zip(self._readers, rooms, strict=True):
            reader.fill(rows, room, part)

    def _assemble(self, rooms: Sequence[Any]) -> Any:
        values = [reader.finish(room) for reader, room in zip(self._readers, rooms, strict=True)]
        if self._form == "dict":
            return dict(zip(self._names, values, strict=True))
        return values[0] if self._form == "field" else tuple(values)


def _parts(count: int, num_parts: int) -> list[slice]:
    """Cut ``count`` rows into nearly equal parts, none of them empty."""
    edges = np.linspace(0, count, min(num_parts, count) + 1).astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _form(container: str, num_fields: int) -> str:
    if container == "mapping":
        return "dict"
    return "field" if container == "single" and num_fields == 1 else "tuple"

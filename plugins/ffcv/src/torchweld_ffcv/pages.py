"""Write a worker's data into the file: whole pages of its own, booked from a shared counter."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torchweld_ffcv.errors import ValueRefused
from torchweld_ffcv.layout import MAX_PAGE_BYTES, PAGE_BYTES, align

if TYPE_CHECKING:
    import numpy as np


class Counter(Protocol):
    """``multiprocessing.Value``: a number that all workers share, with its lock."""

    value: int

    def get_lock(self) -> Any:
        """A context manager."""


class WriteFailed(Exception):
    """The file itself could not be written: the disk is full, say. No fault of a sample."""


@dataclass
class PageWriter:
    """Collects data in a page and writes it when it is full.

    A value larger than a page gets a region of the next power of two, at a multiple of its size:
    whichever page size the header states at last, no value crosses a border of it.

    Attributes:
        fd: of the file, open for writing.
        end: where the next free page begins, shared by all workers.
        segments: ``(offset, bytes, crc32)`` of what has been written since it was asked last.
    """

    fd: int
    end: Counter
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    _page: bytearray = field(default_factory=lambda: bytearray(PAGE_BYTES))
    _offset: int = 0
    _used: int = PAGE_BYTES  # no page has been booked yet

    def put(self, data: Any) -> int:
        """Store bytes or a contiguous array, not empty, and return where they lie in the file.

        Raises:
            ValueRefused: larger than any page that FFCV knows.
            WriteFailed: the file cannot be written.
        """
        view = memoryview(data).cast("B")
        if view.nbytes > PAGE_BYTES:
            return self._put_large(view)
        if self._used + view.nbytes > PAGE_BYTES:
            self.flush()
            self._offset, self._used = self._book(PAGE_BYTES), 0
        start = self._used
        self._page[start : start + view.nbytes] = view
        self._used += view.nbytes
        return self._offset + start

    def flush(self) -> None:
        """Write the page that is not full yet; the next value begins another one."""
        if self._offset:
            self._write(self._offset, memoryview(self._page)[: self._used])
        self._offset, self._used = 0, PAGE_BYTES

    def _put_large(self, view: memoryview) -> int:
        size = 1 << (view.nbytes - 1).bit_length()
        if size > MAX_PAGE_BYTES:
            raise ValueRefused(f"has {view.nbytes} bytes, and FFCV stores at most {MAX_PAGE_BYTES}")
        offset = self._book(size)
        self._write(offset, view)
        return offset

    def _book(self, size: int) -> int:
        with self.end.get_lock():
            offset = align(self.end.value, size)
            self.end.value = offset + size
        return offset

    def _write(self, offset: int, view: memoryview) -> None:
        write_at(self.fd, offset, view)
        self.segments.append((offset, view.nbytes, zlib.crc32(view)))


def write_at(fd: int, offset: int, data: Any) -> None:
    """Write all of ``data``, wherever the file position is.

    Raises:
        WriteFailed: the disk is full, or a limit is reached.
    """
    view = memoryview(data).cast("B")
    try:
        while view.nbytes:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise WriteFailed(_no_room(error, offset)) from error


def sync(fd: int) -> None:
    """Wait until everything is on disk.

    Raises:
        WriteFailed: the disk says only now that it is full or broken.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        raise WriteFailed(_no_room(error, os.fstat(fd).st_size)) from error


def _no_room(error: OSError, num_bytes: int) -> str:
    return f"{error.strerror} after {num_bytes} bytes; make room there or choose another place"


@dataclass(frozen=True)
class Piece:
    """Consecutive samples as they were written.

    Attributes:
        rows: metadata, one row a sample.
        allocations: regions, with the sample counted from the piece's first.
        skipped: ``(index in the dataset, why)`` of samples that were left out.
    """

    rows: np.ndarray[Any, Any]
    allocations: np.ndarray[Any, Any]
    skipped: tuple[tuple[int, str], ...] = ()

"""Put the pieces of a conversion together: tables, manifest, checksums, and the header last."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchweld_ffcv import layout
from torchweld_ffcv.layout import PAGE_BYTES, SEGMENT, Manifest, align
from torchweld_ffcv.pages import Piece, sync, write_at
from torchweld_ffcv.samples import SampleFields

_COPY_BYTES = PAGE_BYTES
Rows = np.ndarray[Any, Any]


@dataclass
class Tables:
    """All samples of a file.

    Attributes:
        rows: metadata in the order of the samples.
        allocations: regions, with the number of their sample.
        segments: regions of the file as they were written, with their checksums.
    """

    rows: Rows
    allocations: Rows
    segments: Rows

    @property
    def page_bytes(self) -> int:
        """The page size that holds the largest value."""
        sizes = self.allocations["size"]
        largest = int(sizes.max()) if len(sizes) else 0
        return max(PAGE_BYTES, 1 << (largest - 1).bit_length() if largest else 0)

    def data_end(self, begin: int) -> int:
        """Where the last region ends, or ``begin`` where there is none."""
        ends = self.segments["offset"] + self.segments["size"]
        return max(begin, int(ends.max()) if len(ends) else 0)


def joined(pieces: Sequence[Piece], segments: Sequence[tuple[int, int, int]]) -> Tables:
    """Join pieces in the order of the samples; skipped samples leave no gap."""
    counts = [len(piece.rows) for piece in pieces]
    starts = np.cumsum([0, *counts[:-1]])
    for piece, start in zip(pieces, starts, strict=True):
        piece.allocations["sample_id"] += np.uint64(start)
    return Tables(
        rows=np.concatenate([piece.rows for piece in pieces]),
        allocations=np.concatenate([piece.allocations for piece in pieces]),
        segments=np.array(list(segments), SEGMENT),
    )


def make_room(fd: int, tables: Tables, pointers: Sequence[tuple[str, str]], needed: int) -> None:
    """Move the regions that lie before byte ``needed`` to the end: the metadata will lie there.

    How much metadata there is, is known at last for a dataset without a length.

    Args:
        fd: of the file.
        tables: changed in place.
        pointers: ``(column, name inside the column or "")`` of every pointer in ``tables.rows``.
        needed: bytes that have to be free from the beginning on.
    """
    end = align(max(tables.data_end(needed), needed), PAGE_BYTES)
    for segment in tables.segments:
        offset, size = int(segment["offset"]), int(segment["size"])
        if offset >= needed:
            continue
        room = PAGE_BYTES if size <= PAGE_BYTES else 1 << (size - 1).bit_length()
        moved = align(end, room)
        _copy(fd, offset, moved, size)
        _shift(tables.allocations["ptr"], offset, size, moved)
        for column, name in pointers:
            _shift(tables.rows[column][name] if name else tables.rows[column], offset, size, moved)
        segment["offset"], end = moved, moved + room


def write_tables(
    fd: int, tables: Tables, fields: SampleFields, data: dict[str, Any], begin: int
) -> None:
    """Write what lies around the pages. The header comes last: until then the file is none.

    Args:
        fd: of the file.
        tables: of all samples.
        fields: of a sample.
        data: what the manifest says.
        begin: where the pages begin.
    """
    end = tables.data_end(begin)
    size = len(layout.pack_manifest(Manifest(data, np.zeros(len(tables.segments) + 2, SEGMENT))))
    table_offset = end + size
    table = tables.allocations.tobytes()
    head = layout.header(
        num_fields=len(fields.names),
        page_bytes=tables.page_bytes,
        num_samples=len(tables.rows),
        table_offset=table_offset,
    )
    front = head + fields.descriptors() + tables.rows.tobytes()
    around = [(0, len(front), zlib.crc32(front)), (table_offset, len(table), zlib.crc32(table))]
    segments = np.concatenate([np.array(around, SEGMENT), tables.segments])
    write_at(fd, end, layout.pack_manifest(Manifest(data, segments)) + table)
    write_at(fd, len(head), front[len(head) :])
    sync(fd)
    write_at(fd, 0, head)


def _copy(fd: int, source: int, target: int, size: int) -> None:
    for start in range(0, size, _COPY_BYTES):
        block = os.pread(fd, min(_COPY_BYTES, size - start), source + start)
        write_at(fd, target + start, block)


def _shift(pointers: Rows, offset: int, size: int, moved: int) -> None:
    inside = (pointers >= offset) & (pointers < offset + size)
    pointers[inside] += np.uint64(moved - offset)

"""Where the pieces of a tensor lie: boxes, ranges of the flattened tensor, and their overlap.

Every piece is a short list of boxes: a box is itself, a range of the flattened tensor is at most
``2 * ndim - 1`` boxes (a head, whole rows, a tail). So one kind of copy serves all four cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Corner = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of the whole tensor; ``offset`` is where it begins in the flattened piece."""

    corner: Corner
    size: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """A part of one tensor.

    Attributes:
        global_shape: of the whole tensor.
        start: an int is a position in the flattened tensor, a tuple the corner of a box.
        local_shape: of the part.
    """

    global_shape: tuple[int, ...]
    start: int | Corner
    local_shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the part."""
        return math.prod(self.local_shape)

    def problem(self) -> str:
        """Say why the part does not lie inside the tensor; empty when it does."""
        if isinstance(self.start, int):
            inside = 0 <= self.start <= math.prod(self.global_shape) - self.numel
        else:
            ends = zip(self.start, self.local_shape, self.global_shape, strict=True)
            same_ndim = len(self.start) == len(self.local_shape) == len(self.global_shape)
            inside = same_ndim and all(0 <= low <= end - size for low, size, end in ends)
        return "" if inside else f"{self} is not inside a tensor of shape {self.global_shape}"

    def span(self) -> tuple[int, int] | None:
        """Return begin and end in the flattened tensor, or None where the part is scattered."""
        if isinstance(self.start, int):
            return self.start, self.start + self.numel
        long_dims = [dim for dim, size in enumerate(self.local_shape) if size != 1]
        inner = slice(long_dims[0] + 1, None) if long_dims else slice(0, 0)
        if self.local_shape[inner] != self.global_shape[inner]:
            return None
        begin = 0
        for corner, size in zip(self.start, self.global_shape, strict=True):
            begin = begin * size + corner
        return begin, begin + self.numel

    def boxes(self) -> list[Box]:
        """Return the disjoint boxes that make up the part."""
        if not isinstance(self.start, int):
            return [Box(self.start, self.local_shape, 0)]
        boxes, offset = [], 0
        for corner, size in _split_range(self.start, self.start + self.numel, self.global_shape):
            boxes.append(Box(corner, size, offset))
            offset += math.prod(size)
        return boxes

    def __str__(self) -> str:
        if isinstance(self.start, int):
            return f"the range [{self.start}, {self.start + self.numel})"
        return f"the box {list(self.local_shape)} at {list(self.start)}"


def copy_overlap(target: Piece, local: Tensor, source: Piece, flat: Tensor) -> None:
    """Copy what two pieces of one tensor share.

    Args:
        target: where ``local`` lies.
        local: written in place, of ``target.local_shape``; contiguous where target is a range.
        source: where ``flat`` lies.
        flat: the flattened source piece, 1-D.
    """
    spans = target.span(), source.span()
    if spans[0] and spans[1] and local.is_contiguous():
        (to, to_end), (begin, end) = spans[0], spans[1]
        low, high = max(to, begin), min(to_end, end)
        if low < high:
            local.view(-1)[low - to : high - to].copy_(flat[low - begin : high - begin])
        return
    for there in source.boxes():
        values = flat[there.offset : there.offset + math.prod(there.size)].view(there.size)
        for here in target.boxes():
            _copy_box(here, _view(target, local, here), there, values)


def find_overlap(pieces: Sequence[Piece]) -> tuple[Piece, Piece] | None:
    """Return two pieces of one tensor that share elements, or None."""
    full = [piece for piece in pieces if piece.numel]
    spans = sorted(((piece.span(), piece) for piece in full if piece.span()), key=_by_span)
    for (first, one), (second, other) in pairwise(spans):
        if first and second and second[0] < first[1]:
            return one, other
    scattered = [piece for piece in full if not piece.span()]
    for index, piece in enumerate(scattered):
        for other in [*scattered[index + 1 :], *(piece for _, piece in spans)]:
            if _share(piece, other):
                return piece, other
    return None


def cover_problem(pieces: Sequence[Piece]) -> str:
    """Say why the pieces do not make up one tensor exactly; empty when they do."""
    shapes = sorted({piece.global_shape for piece in pieces})
    if len(shapes) > 1:
        return f"its pieces come from tensors of shapes {[list(shape) for shape in shapes]}"
    outside = next((piece.problem() for piece in pieces if piece.problem()), "")
    if outside:
        return outside
    overlap = find_overlap(pieces)
    if overlap:
        return f"{overlap[0]} and {overlap[1]} overlap"
    found, wanted = sum(piece.numel for piece in pieces), math.prod(shapes[0])
    return "" if found == wanted else f"only {found} of {wanted} values are there"


def _split_range(begin: int, end: int, shape: tuple[int, ...]) -> Iterator[tuple[Corner, Corner]]:
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    stride = math.prod(shape[1:])
    (row, head), (last, tail) = divmod(begin, stride), divmod(end, stride)
    if row == last:
        yield from _in_row(row, head, tail, shape)
        return
    if head:
        yield from _in_row(row, head, stride, shape)
        row += 1
    if row < last:
        yield (row, *(0 for _ in shape[1:])), (last - row, *shape[1:])
    yield from _in_row(last, 0, tail, shape)


def _in_row(
    row: int, begin: int, end: int, shape: tuple[int, ...]
) -> Iterator[tuple[Corner, Corner]]:
    for corner, size in _split_range(begin, end, shape[1:]):
        yield (row, *corner), (1, *size)


def _view(piece: Piece, local: Tensor, box: Box) -> Tensor:
    if not isinstance(piece.start, int):
        return local
    return local.view(-1)[box.offset : box.offset + math.prod(box.size)].view(box.size)


def _copy_box(here: Box, local: Tensor, there: Box, values: Tensor) -> None:
    low = [max(a, b) for a, b in zip(here.corner, there.corner, strict=True)]
    high = [min(a, b) for a, b in zip(_end(here), _end(there), strict=True)]
    if all(begin < end for begin, end in zip(low, high, strict=True)):
        local[_slices(here, low, high)].copy_(values[_slices(there, low, high)])


def _slices(box: Box, low: Sequence[int], high: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for a, b, c in zip(low, high, box.corner, strict=True))


def _end(box: Box) -> Corner:
    return tuple(corner + size for corner, size in zip(box.corner, box.size, strict=True))


def _share(one: Piece, other: Piece) -> bool:
    return any(_meet(a, b) for a in one.boxes() for b in other.boxes())


def _meet(one: Box, other: Box) -> bool:
    begins = (max(a, b) for a, b in zip(one.corner, other.corner, strict=True))
    ends = (min(a, b) for a, b in zip(_end(one), _end(other), strict=True))
    return all(begin < end for begin, end in zip(begins, ends, strict=True))


def _by_span(pair: tuple[tuple[int, int] | None, Piece]) -> tuple[int, int]:
    return pair[0] or (0, 0)

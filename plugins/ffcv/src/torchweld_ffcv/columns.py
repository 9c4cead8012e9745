"""The fields of a ``.beton`` file, each with a reader that fills some rows of a batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from torchweld.errors import InvalidArgument, RunError
from torchweld_ffcv import windows
from torchweld_ffcv.beton import Beton, Field
from torchweld_ffcv.contract import FieldContract
from torchweld_ffcv.cropping import part_decoder
from torchweld_ffcv.errors import BetonError, ValueRefused
from torchweld_ffcv.imports import libffcv_address
from torchweld_ffcv.layout import JPEG_MODE
from torchweld_ffcv.memory import Recycler
from torchweld_ffcv.pixels import Images, Run, Target, read_images
from torchweld_ffcv.resampling import AREA, BILINEAR
from torchweld_ffcv.spec import FieldSpec, ImageSpec, Normalize, NumberSpec, Skip, Spec
from torchweld_ffcv.values import ImageFile

Array = np.ndarray[Any, Any]

_CROPS = {
    "none": windows.WHOLE,
    "random_resized": windows.RANDOM_RESIZED,
    "center": windows.CENTER,
    "shorter_side": windows.SHORTER_SIDE,
    "padded": windows.PADDED,
}


@dataclass(frozen=True)
class Rows:
    """Samples of one batch, in one epoch of one seed.

    Attributes:
        numbers: of the samples in the file, int64.
    """

    numbers: Array
    seed: int
    epoch: int

    def part(self, rows: slice) -> Rows:
        """Some of them."""
        return Rows(self.numbers[rows], self.seed, self.epoch)


class FieldReader(Protocol):
    """Reads one field; its methods are called from several threads."""

    contract: FieldContract

    def allocate(self, count: int) -> Any:
        """Make room for ``count`` samples."""

    def fill(self, rows: Rows, room: Any, part: slice) -> None:
        """Read those rows into that part of the room."""

    def finish(self, room: Any) -> Any:
        """Turn the room into what a batch holds."""


class FileData:
    """The bytes of a file and where the regions in it end; mapped, so ranks share one copy."""

    def __init__(self, beton: Beton) -> None:
        self.path = beton.path
        self.bytes = np.memmap(beton.path, np.uint8, mode="r")
        table = beton.allocations()
        order = np.argsort(table["ptr"], kind="stable")  # it is made of a few sorted runs
        self._starts, self._sizes = table["ptr"][order], table["size"][order]

    def sizes(self, starts: Array) -> Array:
        """Number of bytes of the regions that begin at ``starts``.

        Raises:
            BetonError: no region begins there.
        """
        places = np.minimum(np.searchsorted(self._starts, starts), len(self._starts) - 1)
        if not np.array_equal(self._starts[places], starts):
            raise BetonError(
                f"{self.path} is damaged: samples lie where its table has nothing; delete it and "
                f"convert again: torchweld ffcv convert SOURCE {self.path}"
            )
        sizes: Array = self._sizes[places]
        return sizes


# ---- one field each ------------------------------------------------------------------------------


class NumberReader:
    """Numbers, which lie in the table of samples itself."""

    def __init__(self, name: str, column: Array, dtype: str) -> None:
        self.contract = FieldContract(name, (), dtype)
        self._column, self._dtype = column, np.dtype(dtype)

    def allocate(self, count: int) -> Array:
        """One number a sample."""
        return np.empty(count, self._dtype)

    def fill(self, rows: Rows, room: Array, part: slice) -> None:
        """Copy them out of the table."""
        room[part] = self._column[rows.numbers]

    def finish(self, room: Array) -> torch.Tensor:
        """A tensor of shape (batch,)."""
        return torch.from_numpy(room)


class ArrayReader:
    """Arrays of one shape."""

    def __init__(self, field: Field, column: Array, data: FileData) -> None:
        assert field.shape is not None
        self._shape, self._dtype = field.shape, np.dtype(field.dtype)
        self._num_bytes = int(np.prod(self._shape)) * self._dtype.itemsize
        self._column, self._data = column, data
        name = str(torch.from_numpy(np.empty(0, self._dtype)).dtype).removeprefix("torch.")
        self.contract = FieldContract(field.name, self._shape, name)

    def allocate(self, count: int) -> Array:
        """One row of bytes a sample."""
        return np.empty((count, self._num_bytes), np.uint8)

    def fill(self, rows: Rows, room: Array, part: slice) -> None:
        """Copy them out of the file."""
        starts = self._column[rows.numbers].tolist()
        for target, start in zip(room[part], starts, strict=True):
            target[:] = self._data.bytes[start : start + self._num_bytes]

    def finish(self, room: Array) -> torch.Tensor:
        """A tensor of shape (batch, …)."""
        return torch.from_numpy(room.view(self._dtype).reshape(len(room), *self._shape))


class ObjectReader:
    """Bytes of any length, or what JSON holds: a list with one item a sample."""

    def __init__(self, field: Field, column: Array, data: FileData) -> None:
        self._is_json = field.kind == "json"
        self._column, self._data = column, data
        kind = "object" if self._is_json else "uint8"
        self.contract = FieldContract(field.name, None, kind)

    def allocate(self, count: int) -> list[Any]:
        """One place a sample."""
        return [None] * count

    def fill(self, rows: Rows, room: list[Any], part: slice) -> None:
        """Copy them out of the file, each with its own length."""
        found = self._column[rows.numbers]
        pairs = zip(found["ptr"].tolist(), found["size"].tolist(), strict=True)
        room[part] = [self._item(self._data.bytes[start : start + size]) for start, size in pairs]

    def finish(self, room: list[Any]) -> list[Any]:
        """The list."""
        return room

    def _item(self, region: Array) -> Any:
        if self._is_json:
            return json.loads(region.tobytes().rstrip(b"\0"))
        return torch.from_numpy(region.copy())


class ImageReader:
    """Images: decoded, cut, resized, flipped and normalised by compiled code without the GIL."""

    def __init__(
        self, field: Field, column: Array, spec: ImageSpec, data: FileData, memory: Recycler
    ) -> None:
        self._name, self._column, self._data = field.name, column, data
        self._memory = memory
        # All at once and in order: one batch after the other, this takes as long as its pixels.
        data.sizes(np.sort(column["data_ptr"]))
        height, width = spec.size or _common_size(field.name, column, data)
        _refuse_too_small(field.name, column, spec)
        self._recipe = _recipe(spec, height, width)
        self._whole = libffcv_address("imdecode")
        self._part = 0 if spec.crop == "none" else _part_decoder(column, data, self._whole)
        self._channels_last = spec.layout == "channels_last"
        self._target = _target(spec.normalize, planes=not self._channels_last)
        self._dtype = np.dtype(np.float32 if spec.normalize else np.uint8)
        self.contract = FieldContract(
            field.name,
            (3, height, width),
            self._dtype.name,
            spec.layout or "contiguous",
            *_range(self._target),
        )

    def allocate(self, count: int) -> Array:
        """One row a sample."""
        size = 3 * self._recipe.height * self._recipe.width
        return self._memory.take((count, size), self._dtype)

    def fill(self, rows: Rows, room: Array, part: slice) -> None:
        """Read them."""
        images = images_of(self._column, rows.numbers, self._data)
        run = Run(rows.seed, rows.epoch, self._whole, self._part)
        given = self._data.bytes, images, self._recipe, run, self._target
        warned = read_images(*given, (-1, room[part]))
        while warned >= 0:
            self._check_decodable(images, warned)
            warned = read_images(*given, (warned, room[part]))

    def _check_decodable(self, images: Images, position: int) -> None:
        """Take the pixels that a decoder only warns of, as Pillow does; its word counts."""
        start, size = int(images.starts[position]), int(images.sizes[position])
        data = self._data.bytes[start : start + size].tobytes()
        number = images.numbers[position]
        try:
            ImageFile(f"sample {number}", data).open()
        except ValueRefused as error:
            raise RunError(
                f"sample {number} of {self._data.path}: the JPEG in field {self._name!r} cannot be "
                "decoded; see whether the file has changed since it was written: torchweld ffcv "
                f"inspect --full {self._data.path}"
            ) from error

    def finish(self, room: Array) -> torch.Tensor:
        """A tensor of shape (batch, 3, height, width)."""
        height, width = self._recipe.height, self._recipe.width
        images = torch.from_numpy(room)
        if self._channels_last:
            return images.view(-1, height, width, 3).permute(0, 3, 1, 2)
        return images.view(-1, 3, height, width)


def images_of(column: Array, numbers: Array, data: FileData) -> Images:
    """Where the images with these numbers lie, and how large they are."""
    found = column[numbers]
    starts, jpeg = found["data_ptr"].astype(np.uint64), found["mode"] == JPEG_MODE
    heights, widths = found["height"].astype(np.int64), found["width"].astype(np.int64)
    sizes = (3 * heights * widths).astype(np.uint64)  # which compiled code reads, stored or not
    if jpeg.any():
        sizes = np.where(jpeg, data.sizes(starts), sizes)
    return Images(
        starts,
        sizes,
        jpeg,
        heights,
        widths,
        numbers,
        largest=3 * int((heights * widths * jpeg).max()),
        widest=int(widths.max()),
    )


def _part_decoder(column: Array, data: FileData, whole: int) -> int:
    """Address of the decoder of parts, tried out on the file's first JPEG; 0 without one."""
    jpegs = np.flatnonzero(column["mode"] == JPEG_MODE)
    if not len(jpegs):
        return 0
    first = images_of(column, jpegs[:1], data)
    start, size = int(first.starts[0]), int(first.sizes[0])
    source = data.bytes[start : start + size]
    return part_decoder(source, int(first.heights[0]), int(first.widths[0]), whole)


def _common_size(name: str, column: Array, data: FileData) -> tuple[int, int]:
    heights, widths = column["height"], column["width"]
    if heights.min() != heights.max() or widths.min() != widths.max():
        raise InvalidArgument(
            f"the images in field {name!r} of {data.path} have from {heights.min()} to "
            f"{heights.max()} rows and from {widths.min()} to {widths.max()} columns and cannot "
            f"form a batch: choose one size, spec={{{name!r}: image(crop='random_resized', "
            "size=224)}"
        )
    return int(heights[0]), int(widths[0])


def _refuse_too_small(name: str, column: Array, spec: ImageSpec) -> None:
    if spec.crop != "padded" or spec.size is None:
        return
    smallest = (int(column["height"].min()), int(column["width"].min()))
    if any(have + 2 * spec.padding < side for have, side in zip(smallest, spec.size, strict=True)):
        raise InvalidArgument(
            f"field {name!r} has images down to {smallest[0]} x {smallest[1]} pixels, which with "
            f"padding={spec.padding} are smaller than size={spec.size}: use a smaller size or more "
            "padding"
        )


def _recipe(spec: ImageSpec, height: int, width: int) -> windows.Recipe:
    return windows.Recipe(
        crop=_CROPS[spec.crop],
        scale=spec.scale,
        ratio=spec.ratio,
        part=float(spec.resize if spec.crop == "shorter_side" else spec.part),
        padding=spec.padding,
        flip=float(spec.flip),
        height=height,
        width=width,
        method=BILINEAR if spec.interpolation == "bilinear" else AREA,
    )


def _target(normalize: Normalize | None, *, planes: bool) -> Target:
    """How pixels are written; without ``normalize`` as they are."""
    if normalize is None:
        zeros, ones = (np.float32(0),) * 3, (np.float32(1),) * 3
        return Target(np.float32(1), zeros, ones, planes)
    mean, std = (tuple(map(np.float32, each)) for each in (normalize.mean, normalize.std))
    return Target(np.float32(1 / 255), mean, std, planes)


def _range(target: Target) -> tuple[float, float]:
    """The smallest and the largest value that can be written."""
    ends = [
        float((np.float32(value) * target.unit - mean) / std)
        for mean, std in zip(target.mean, target.std, strict=True)
        for value in (0, 255)
    ]
    return min(ends), max(ends)


def field_readers(beton: Beton, spec: Spec, data: FileData, memory: Recycler) -> list[FieldReader]:
    """A reader for every field that the spec does not skip, in the order of the file."""
    readers = []
    for column, field in zip(beton.metadata_dtype.names or (), beton.fields, strict=True):
        chosen = spec[field.name]
        if not isinstance(chosen, Skip):
            readers.append(_field_reader(field, beton.metadata[column], chosen, data, memory))
    return readers


def _field_reader(
    field: Field, column: Array, spec: FieldSpec, data: FileData, memory: Recycler
) -> FieldReader:
    if isinstance(spec, ImageSpec):
        return ImageReader(field, column, spec, data, memory)
    if isinstance(spec, NumberSpec):
        return NumberReader(field.name, column, spec.dtype)
    if field.kind == "array":
        return ArrayReader(field, column, data)
    return ObjectReader(field, column, data)

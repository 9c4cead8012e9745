"""From the bytes of a ``.beton`` file to the pixels of a batch, in one pass over each image.

A JPEG decoder writes what is needed of the image, what is cut out of that or resampled goes from
there into a buffer of the output's size, and from the buffer, which no cache loses, into the batch:
normalised and laid out by a loop that the compiler turns into vector instructions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from torchweld_ffcv.compiled import c_function, compiled, prefetch
from torchweld_ffcv.randomness import sample_key
from torchweld_ffcv.resampling import find_taps, weighted_rows
from torchweld_ffcv.windows import WHOLE, Recipe, Window, find_window, needed

_UINT32 = types.uint32
_ONE, _TWO, _THREE = np.uint64(1), np.uint64(2), np.uint64(3)
_LINE, _FETCHED = np.uint64(64), np.uint64(4096)  # bytes: of the cache; of the next image

_imdecode = c_function(
    *(types.uintp, types.uint64, _UINT32, _UINT32, types.uintp),
    *(_UINT32,) * 8,
    returns=types.int32,
)
"""``imdecode`` of libffcv: source, size, height, width, destination, then crop, scale and flip."""

_decode_part = c_function(
    *(types.uintp, types.uint64, _UINT32, _UINT32, types.uintp),
    *(_UINT32,) * 4,
    returns=types.int32,
)
"""``decode_part`` of ``crop.c``: source, size, height, width, destination, then the part."""


class Images(NamedTuple):
    """The images of a batch in the file, one entry each.

    Attributes:
        starts: position of the first byte, uint64.
        sizes: number of bytes, uint64.
        jpeg: whether they are a JPEG file and not pixels, bool.
        heights: in pixels, int64.
        widths: in pixels, int64.
        numbers: of the samples in the file, which random numbers depend on, int64.
        largest: bytes of the largest JPEG when it is decoded.
        widest: columns of the widest image.
    """

    starts: Any
    sizes: Any
    jpeg: Any
    heights: Any
    widths: Any
    numbers: Any
    largest: int
    widest: int


class Run(NamedTuple):
    """What is the same for all batches of an epoch.

    Attributes:
        seed: of the training.
        epoch: of the training.
        whole: address of libffcv's ``imdecode``.
        part: address of ``decode_part``, or 0.
    """

    seed: int
    epoch: int
    whole: int
    part: int


class Target(NamedTuple):
    """How pixels are written: each becomes ``(value * unit - mean) / std`` in float32.

    Attributes:
        unit: one level of 255.
        mean: of each channel.
        std: of each channel.
        planes: one channel after the other, and not one pixel after the other.
    """

    unit: np.float32
    mean: tuple[np.float32, ...]
    std: tuple[np.float32, ...]
    planes: bool


@compiled
def read_images(
    data: Any, images: Images, recipe: Recipe, run: Run, target: Target, to: tuple[int, Any]
) -> int:
    """Write images into a batch.

    Args:
        data: the bytes of the file.
        images: which ones.
        recipe: what is done with each.
        run: what the random numbers depend on, and who decodes.
        target: how they are written.
        to: where to begin, and the batch or some rows of it, ``(images, height * width * 3)``.
            -1: with the first image; otherwise with the one at this position, of which the decoder
            is known to complain.

    Returns:
        -1, or the position of the first other image of which the decoder complains.
    """
    warned, out = to
    scratch = np.empty(images.largest, np.uint8)
    part = np.empty(3 * recipe.height * recipe.width, np.uint8)
    sums = np.empty(3 * images.widest, np.float32)
    for i in range(max(warned, 0), len(images.starts)):
        height, width = images.heights[i], images.widths[i]
        _fetch_next(data, images, i)
        pixels = data[images.starts[i] : images.starts[i] + images.sizes[i]]
        key = sample_key(run.seed, run.epoch, images.numbers[i])
        window = find_window(recipe, height, width, key)
        if images.jpeg[i]:
            failed = _decode(run, pixels, scratch, (height, width), window, recipe) != 0
            if failed and i != warned:
                return i
            pixels = scratch
        if window.rows[1] == 1.0 and window.columns[1] == 1.0:
            pixels = _cut(pixels, (height, width), window, recipe, part)
        else:
            _resample(pixels, sums[: 3 * width], window, recipe, part)
            pixels = part
        _write(pixels, target, out[i])
    return -1


@compiled
def _fetch_next(data: Any, images: Images, i: int) -> None:
    """Have the beginning of the next image come from memory while this one is worked on.

    A processor fetches what is read in order by itself, but images lie anywhere in the file.
    """
    if i + 1 < len(images.starts):
        for place in range(np.uint64(0), min(images.sizes[i + 1], _FETCHED), _LINE):
            prefetch(data, images.starts[i + 1] + place)


@compiled
def decode_images(data: Any, images: Images, address: int) -> None:
    """Decode images and drop the pixels: how fast could it be at best?"""
    scratch = np.empty(images.largest, np.uint8)
    for i in range(len(images.starts)):
        source = data[images.starts[i] : images.starts[i] + images.sizes[i]]
        _decode_whole(address, source, scratch, (images.heights[i], images.widths[i]))


@compiled
def _decode(
    run: Run, source: Any, pixels: Any, size: tuple[int, int], window: Window, recipe: Recipe
) -> int:
    """Decode what the window needs of an image of that height and width; 0 for success."""
    if run.part == 0 or recipe.crop == WHOLE:
        return _decode_whole(run.whole, source, pixels, size)
    top, bottom = needed(window.rows, recipe.height, size[0])
    left, right = needed(window.columns, recipe.width, size[1])
    return _decode_part(  # type: ignore[no-any-return]  # numba knows that it is an int32
        run.part,
        (
            *(source.ctypes.data, source.size, size[0], size[1], pixels.ctypes.data),
            *(top, bottom, left, right),
        ),
    )


@compiled
def _decode_whole(address: int, source: Any, pixels: Any, size: tuple[int, int]) -> int:
    return _imdecode(  # type: ignore[no-any-return]  # as above
        address,
        (
            *(source.ctypes.data, source.size, size[0], size[1], pixels.ctypes.data),
            *(size[0], size[1], 0, 0, 1, 1, 0, 0),
        ),
    )


@compiled
def _cut(pixels: Any, size: tuple[int, int], window: Window, recipe: Recipe, part: Any) -> Any:
    """Cut a part out of an image of that height and width; black where there is no image.

    Returns:
        ``part``, or where the part lies in the image as it has to be.
    """
    height, width = size
    top, left = int(window.rows[0]), int(window.columns[0])
    bottom, right = top + recipe.height, left + recipe.width
    inside = min(top, left) >= 0 and bottom <= height and right <= width
    if inside and recipe.width == width and not window.flipped:
        return pixels[3 * top * width : 3 * bottom * width]
    if not inside:
        for j in range(len(part)):
            part[j] = 0
    begin, end = max(left, 0), min(right, width)
    first, count = right - end if window.flipped else begin - left, np.uint64(end - begin)
    for row in range(max(top, 0), min(bottom, height)):
        source = np.uint64(3 * (row * width + begin))
        to = np.uint64(3 * ((row - top) * recipe.width + first))
        if window.flipped:
            _mirror(pixels, source, part, to, count)
        else:
            _copy(pixels, source, part, to, count)
    return part


# Places have no sign below: one under 0 would count from the end of an array, and to ask that for
# every value takes as long as a resampled image, and ten times as long as one that is mirrored.


@compiled
def _copy(pixels: Any, source: np.uint64, part: Any, to: np.uint64, count: np.uint64) -> None:
    """Copy ``count`` pixels from ``pixels[source]`` on to ``part[to]``."""
    for j in range(_THREE * count):
        part[to + j] = pixels[source + j]


@compiled
def _mirror(pixels: Any, source: np.uint64, part: Any, to: np.uint64, count: np.uint64) -> None:
    """As ``_copy``, the last pixel first."""
    source += _THREE * count
    for _ in range(count):
        source -= _THREE
        part[to] = pixels[source]
        part[to + _ONE] = pixels[source + _ONE]
        part[to + _TWO] = pixels[source + _TWO]
        to += _THREE


@compiled
def _resample(pixels: Any, sums: Any, window: Window, recipe: Recipe, part: Any) -> None:
    """Give a part of an image another size; ``sums`` has the length of its rows."""
    row_bytes, last = len(sums), recipe.width - 1
    row_starts, row_counts, row_weights = find_taps(window.rows, recipe.height, recipe.method)
    starts, counts, weights = find_taps(window.columns, recipe.width, recipe.method)
    left = 3 * starts[0]
    sums = sums[: 3 * (starts[last] + counts[last]) - left]
    to = np.uint64(0)
    for y in range(recipe.height):
        first = row_starts[y] * row_bytes + left
        weighted_rows(pixels, first, row_bytes, row_weights[y, : row_counts[y]], sums)
        for i in range(recipe.width):
            x = np.uint64(last - i if window.flipped else i)
            red = green = blue = np.float32(0.5)  # cut off below, which then rounds
            position = np.uint64(3 * starts[x] - left)
            for k in range(np.uint64(counts[x])):
                weight = weights[x, k]
                red += weight * sums[position]
                green += weight * sums[position + _ONE]
                blue += weight * sums[position + _TWO]
                position += _THREE
            part[to] = np.uint8(red)
            part[to + _ONE] = np.uint8(green)
            part[to + _TWO] = np.uint8(blue)
            to += _THREE


@compiled
def _write(pixels: Any, target: Target, out: Any) -> None:
    """Write an image into the batch.

    Calculated as torchvision's v2 does, bit for bit. Division looks dear, but eight of them take as
    long as one: 110 us for 512 images of 32 x 32, where a table of the 256 values takes 340.
    """
    unit, mean, std, count = target.unit, target.mean, target.std, len(out) // 3
    if target.planes:
        red, green, blue = out[:count], out[count : 2 * count], out[2 * count :]
        for x in range(count):
            red[x] = (np.float32(pixels[3 * x]) * unit - mean[0]) / std[0]
            green[x] = (np.float32(pixels[3 * x + 1]) * unit - mean[1]) / std[1]
            blue[x] = (np.float32(pixels[3 * x + 2]) * unit - mean[2]) / std[2]
        return
    for x in range(count):
        out[3 * x] = (np.float32(pixels[3 * x]) * unit - mean[0]) / std[0]
        out[3 * x + 1] = (np.float32(pixels[3 * x + 1]) * unit - mean[1]) / std[1]
        out[3 * x + 2] = (np.float32(pixels[3 * x + 2]) * unit - mean[2]) / std[2]

"""Resizing one image: which source pixels make an output pixel, and with which weights.

Rows and columns are resampled one after the other; each has its own taps. ``area`` averages what an
output pixel covers (OpenCV's INTER_AREA, FFCV's only choice), ``bilinear`` is the triangle filter
that Pillow and torchvision use with ``antialias=True``. Where an image is enlarged both interpolate
between neighbours: the mean over less than a pixel would show blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from torchweld_ffcv.compiled import compiled

AREA, BILINEAR = 0, 1


@compiled
def find_taps(axis: tuple[float, float, int, int], size: int, method: int) -> tuple[Any, Any, Any]:
    """Weights of the source pixels along one axis.

    Args:
        axis: ``(first, step, low, high)``: output pixel i covers the source from
            ``first + i * step`` to ``first + (i + 1) * step``; pixels outside [low, high) count as
            if the image ended there.
        size: number of output pixels.
        method: ``AREA`` or ``BILINEAR``.

    Returns:
        For each output pixel the first source pixel ``(size,)``, the number of them ``(size,)``
        and their weights ``(size, most)``, float32, which sum to 1.
    """
    first, step, low, high = axis
    reach = max(step, 1.0)
    most = int(np.ceil(2.0 * reach)) + 2
    starts, counts = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, most), np.float32)
    for i in range(size):
        begin, end = first + i * step, first + (i + 1) * step
        covers = method == AREA and step >= 1.0
        if not covers:
            center = 0.5 * (begin + end)
            begin, end = center - reach, center + reach
        start = max(int(np.floor(begin + (0.0 if covers else 0.5))), low)
        stop = min(int(np.ceil(end) if covers else np.floor(end + 0.5)), high)
        start = min(start, high - 1)
        stop = max(stop, start + 1)
        total = 0.0
        for k in range(stop - start):
            pixel = start + k
            if covers:
                weight = max(min(pixel + 1.0, end) - max(float(pixel), begin), 0.0)
            else:
                weight = max(1.0 - abs(pixel + 0.5 - center) / reach, 0.0)
            weights[i, k] = weight
            total += weight
        for k in range(stop - start):
            weights[i, k] /= total
        starts[i], counts[i] = start, stop - start
    return starts, counts, weights


@compiled
def weighted_rows(pixels: Any, first: int, row_bytes: int, weights: Any, sums: Any) -> None:
    """Write a weighted sum of rows into ``sums``, float32.

    Args:
        pixels: of an image, one after the other.
        first: position of the first pixel.
        row_bytes: from there to the pixel below.
        weights: of the rows.
        sums: as many numbers as are wanted of a row.
    """
    row, weight = pixels[first : first + len(sums)], weights[0]
    for j in range(len(sums)):
        sums[j] = weight * np.float32(row[j])
    for k in range(1, len(weights)):
        first += row_bytes
        row, weight = pixels[first : first + len(sums)], weights[k]
        for j in range(len(sums)):
            sums[j] += weight * np.float32(row[j])

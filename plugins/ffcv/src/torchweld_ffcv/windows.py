"""Which part of an image becomes the output: whole, in the middle, or at random."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from torchweld_ffcv.compiled import compiled
from torchweld_ffcv.randomness import uniform

WHOLE, RANDOM_RESIZED, CENTER, SHORTER_SIDE, PADDED = range(5)
"""What is cut out of an image; see :class:`torchweld_ffcv.spec.ImageSpec`."""

Axis = tuple[float, float, int, int]
"""``(first, step, low, high)``: output pixel i covers the source from ``first + i * step`` to
``first + (i + 1) * step``; nothing outside of [low, high) is read."""

_ATTEMPTS = 10  # of a random part, as in torchvision and FFCV
_FLIP_DRAW = 0


class Recipe(NamedTuple):
    """What is done with every image of a batch, as numbers for compiled code.

    Attributes:
        crop: one of ``WHOLE`` … ``PADDED``.
        scale: of RANDOM_RESIZED: smallest and largest share of the area.
        ratio: of RANDOM_RESIZED: smallest and largest width / height.
        part: of CENTER: cut square / shorter side; of SHORTER_SIDE: length it is resized to.
        padding: of PADDED: black pixels around the image.
        flip: probability of a horizontal flip.
        height: of the output.
        width: of the output.
        method: of resampling.
    """

    crop: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    part: float
    padding: int
    flip: float
    height: int
    width: int
    method: int


class Window(NamedTuple):
    """The part of one image.

    Attributes:
        rows: the vertical axis.
        columns: the horizontal axis.
        flipped: left and right change places.
    """

    rows: Axis
    columns: Axis
    flipped: bool


@compiled
def find_window(recipe: Recipe, height: int, width: int, key: np.uint64) -> Window:
    """Choose the part of an image of that size; ``key`` decides where chance takes part."""
    flipped = uniform(key, _FLIP_DRAW) < recipe.flip
    if recipe.crop == SHORTER_SIDE:
        rows, columns = _middle_of_resized(recipe, height, width)
        return Window(rows, columns, flipped)
    top, left, num_rows, num_columns = 0, 0, height, width
    if recipe.crop == RANDOM_RESIZED:
        top, left, num_rows, num_columns = random_box(recipe, height, width, key)
    elif recipe.crop == CENTER:
        side = max(1, int(recipe.part * min(height, width)))
        top, left, num_rows, num_columns = (height - side) // 2, (width - side) // 2, side, side
    elif recipe.crop == PADDED:
        padding, num_rows, num_columns = recipe.padding, recipe.height, recipe.width
        top = int(uniform(key, 1) * (height + 2 * padding - num_rows + 1)) - padding
        left = int(uniform(key, 2) * (width + 2 * padding - num_columns + 1)) - padding
    return Window(
        (float(top), num_rows / recipe.height, top, top + num_rows),
        (float(left), num_columns / recipe.width, left, left + num_columns),
        flipped,
    )


@compiled
def random_box(
    recipe: Recipe, height: int, width: int, key: np.uint64
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part of random shape.

    Source: Szegedy et al. 2015, "Going deeper with convolutions", section 6; the steps are those of
    torchvision's RandomResizedCrop.
    """
    low, high = np.log(recipe.ratio[0]), np.log(recipe.ratio[1])
    for attempt in range(_ATTEMPTS):
        draw = 1 + 4 * attempt
        share = recipe.scale[0] + uniform(key, draw) * (recipe.scale[1] - recipe.scale[0])
        shape = np.exp(low + uniform(key, draw + 1) * (high - low))
        columns = round(np.sqrt(height * width * share * shape))
        rows = round(np.sqrt(height * width * share / shape))
        if 0 < columns <= width and 0 < rows <= height:
            top = int(uniform(key, draw + 2) * (height - rows + 1))
            left = int(uniform(key, draw + 3) * (width - columns + 1))
            return top, left, rows, columns
    rows, columns = height, width
    if width / height < recipe.ratio[0]:
        rows = min(round(width / recipe.ratio[0]), height)
    elif width / height > recipe.ratio[1]:
        columns = min(round(height * recipe.ratio[1]), width)
    return (height - rows) // 2, (width - columns) // 2, rows, columns


@compiled
def _middle_of_resized(recipe: Recipe, height: int, width: int) -> tuple[Axis, Axis]:
    """The middle of the image after its shorter side was resized to ``part`` pixels."""
    part = int(recipe.part)
    rows = part if height <= width else int(part * height / width)
    columns = part if width < height else int(part * width / height)
    top = round((rows - recipe.height) / 2.0)
    left = round((columns - recipe.width) / 2.0)
    down, across = height / rows, width / columns
    return (top * down, down, 0, height), (left * across, across, 0, width)


@compiled
def needed(axis: Axis, size: int, length: int) -> tuple[int, int]:
    """First source pixel that ``size`` output pixels are made of, and the one behind the last.

    Args:
        axis: of the window.
        size: number of output pixels.
        length: number of source pixels.
    """
    first, step, low, high = axis
    reach = max(step, 1.0)
    begin = max(int(np.floor(first - reach)), low, 0)
    end = min(int(np.ceil(first + size * step + reach)), high, length)
    return begin, max(end, begin + 1)

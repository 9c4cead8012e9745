"""What is done with the fields of a sample while reading, in a few words.

``spec={"image": image(crop="random_resized", size=224, flip=0.5, normalize=IMAGENET)}``; a field
that is not named is read as it is stored. Plain records: importing this needs neither numpy nor
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Union

Crop = Literal["none", "random_resized", "center", "shorter_side", "padded"]
Layout = Literal["contiguous", "channels_last"]
Interpolation = Literal["area", "bilinear"]
Pair = tuple[float, float]
Triple = tuple[float, float, float]

EVALUATION_PART = 0.875
"""Share of the shorter side that is cut out where training cuts at random: 224 of 256."""


@dataclass(frozen=True)
class Normalize:
    """``(value - mean) / std`` for each channel, of values in [0, 1] as in torchvision."""

    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if {len(self.mean), len(self.std)} != {3}:
            raise ValueError(f"{self} needs three channels")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std={self.std} has to be finite and > 0")
        if not all(abs(value) < math.inf for value in self.mean):
            raise ValueError(f"mean={self.mean} has to be finite")
        if max(self.mean) > 1 or max(self.std) > 1:
            raise ValueError(
                f"mean={self.mean}, std={self.std} are meant for pixels in 0 … 255, and these are "
                "in 0 … 1: divide them by 255"
            )


IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNIT = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Floats in [0, 1]: what torchvision's ``v2.ToDtype(torch.float32, scale=True)`` gives."""


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes a tensor; made by :func:`image`.

    Attributes:
        crop: what is cut out before resizing.
        size: (height, width) of the result; None: that of the stored images, which are all alike.
        scale: smallest and largest share of the area, of ``random_resized``.
        ratio: smallest and largest width / height, of ``random_resized``.
        part: of the shorter side, of ``center``.
        resize: pixels of the shorter side before ``size`` is cut out, of ``shorter_side``.
        padding: black pixels around the image, of ``padded``.
        flip: probability of a horizontal flip.
        normalize: makes float32; None: uint8 in 0 … 255, which the model has to normalise.
        layout: of the batch in memory; None: what the model wants.
        interpolation: ``area`` is FFCV's, ``bilinear`` torchvision's with antialias.
    """

    crop: Crop = "none"
    size: tuple[int, int] | None = None
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)
    part: float = EVALUATION_PART
    resize: int = 0
    padding: int = 0
    flip: float = 0.0
    normalize: Normalize | None = UNIT
    layout: Layout | None = None
    interpolation: Interpolation = "area"

    def __post_init__(self) -> None:
        problem = _problem_of(self)
        if problem:
            raise ValueError(problem)

    def for_evaluation(self) -> ImageSpec:
        """The same without chance: the middle instead of a random part, and no flip."""
        if self.crop == "random_resized":
            return replace(self, crop="center", part=EVALUATION_PART, flip=0.0)
        if self.crop == "padded":
            return replace(self, crop="none", padding=0, flip=0.0)
        return replace(self, flip=0.0)


@dataclass(frozen=True)
class NumberSpec:
    """A number a sample becomes a tensor of shape (batch,)."""

    dtype: Literal["int64", "float32", "float64"]


@dataclass(frozen=True)
class Skip:
    """The field is not read and not part of the batch."""


@dataclass(frozen=True)
class AsStored:
    """Arrays as tensors, bytes and JSON as lists."""


FieldSpec = Union[ImageSpec, NumberSpec, AsStored, Skip]
Spec = Mapping[str, FieldSpec]


def image(
    *,
    crop: Crop = "none",
    size: int | tuple[int, int] | None = None,
    scale: Pair = (0.08, 1.0),
    ratio: Pair = (3 / 4, 4 / 3),
    part: float = EVALUATION_PART,
    resize: int = 0,
    padding: int = 0,
    flip: float = 0.0,
    normalize: Normalize | None = UNIT,
    layout: Layout | None = None,
    interpolation: Interpolation = "area",
) -> ImageSpec:
    """Read a field as images of shape (batch, 3, height, width).

    Args:
        crop: ``none``: the whole image; ``random_resized``: a random part of random shape;
            ``center``: a square of ``part`` of the shorter side, in the middle; ``shorter_side``:
            resized until the shorter side has ``resize`` pixels, then the middle; ``padded``: a
            random place after ``padding`` black pixels were added on every side.
        size: of the result, one number for a square.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        part: of the shorter side, in (0, 1].
        resize: pixels of the shorter side.
        padding: pixels on every side.
        flip: probability of a horizontal flip, in [0, 1].
        normalize: mean and standard deviation of pixels in [0, 1]; None keeps uint8.
        layout: of the batch in memory.
        interpolation: how sizes are changed.

    Raises:
        ValueError: an argument is out of range, or two do not fit.
    """
    square = (size, size) if isinstance(size, int) else size
    return ImageSpec(
        crop=crop,
        size=None if square is None else (square[0], square[1]),
        scale=(scale[0], scale[1]),
        ratio=(ratio[0], ratio[1]),
        part=part,
        resize=resize,
        padding=padding,
        flip=flip,
        normalize=normalize,
        layout=layout,
        interpolation=interpolation,
    )


def int64() -> NumberSpec:
    """Read a field as class indices or counts: int64 of shape (batch,)."""
    return NumberSpec("int64")


def float32() -> NumberSpec:
    """Read a number as float32 of shape (batch,)."""
    return NumberSpec("float32")


def float64() -> NumberSpec:
    """Read a number as float64 of shape (batch,)."""
    return NumberSpec("float64")


def skip() -> Skip:
    """Leave a field out of the batch."""
    return Skip()


def _problem_of(spec: ImageSpec) -> str:
    """What is wrong with a spec; empty for nothing."""
    if spec.crop not in {"none", "random_resized", "center", "shorter_side", "padded"}:
        return (
            f"crop={spec.crop!r} is none of 'none', 'random_resized', 'center', 'shorter_side' "
            "and 'padded'"
        )
    if spec.crop != "none" and spec.size is None:
        return f"crop={spec.crop!r} needs the size of what is cut out: size=224, say"
    if spec.size is not None and not all(1 <= side <= 65535 for side in spec.size):
        return f"size={spec.size} is no height and width in pixels"
    if spec.interpolation not in {"area", "bilinear"}:
        return f"interpolation={spec.interpolation!r} is neither 'area' nor 'bilinear'"
    if spec.layout not in {None, "contiguous", "channels_last"}:
        return f"layout={spec.layout!r} is neither 'contiguous' nor 'channels_last'"
    return _range_problem(spec)


def _range_problem(spec: ImageSpec) -> str:
    if not 0 <= spec.flip <= 1:
        return f"flip={spec.flip!r} is no probability in [0, 1]"
    if not 0 < spec.scale[0] <= spec.scale[1] <= 1:
        return f"scale={spec.scale} has to be two shares of the area, 0 < smallest <= largest <= 1"
    if not 0 < spec.ratio[0] <= spec.ratio[1] < math.inf:
        return f"ratio={spec.ratio} has to be two ratios, 0 < smallest <= largest"
    if not 0 < spec.part <= 1:
        return f"part={spec.part!r} of the shorter side is not in (0, 1]"
    if spec.padding < 0:
        return f"padding={spec.padding!r} is no number of pixels >= 0"
    if spec.crop == "shorter_side" and spec.size is not None and spec.resize < max(spec.size):
        return (
            f"resize={spec.resize} leaves images smaller than size={spec.size}: resize to at least "
            f"{max(spec.size)}"
        )
    return ""

"""How a field of a sample is stored: ``fields={"image": Image(store="jpeg"), "label": Int()}``.

Plain records, for :func:`torchweld_ffcv.convert`; what happens to a field while reading is said
elsewhere. Without them the kinds are found out from the first samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union


@dataclass(frozen=True)
class Image:
    """A picture with three colour channels.

    PIL images, image files, and uint8 arrays or tensors of shape (height, width, 3) or
    (3, height, width).
    """

    store: Literal["auto", "jpeg", "raw"] = "auto"  # auto: JPEG files keep their bytes, others raw
    quality: int = 90  # of JPEG that has to be encoded, in [1, 100]; above 95 gains nothing
    max_side: int | None = None  # shrink larger pictures to this many pixels, > 0
    to_rgb: bool = False  # grey, palette, CMYK and alpha become three channels; False: an error

    def __post_init__(self) -> None:
        if self.store not in {"auto", "jpeg", "raw"}:
            raise ValueError(f"store={self.store!r} is none of 'auto', 'jpeg' and 'raw'")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality!r} is not in [1, 100]")
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"max_side={self.max_side!r} is not a number of pixels > 0")


@dataclass(frozen=True)
class Int:
    """A whole number of 64 bits; what has a fraction is an error, never cut off."""


@dataclass(frozen=True)
class Float:
    """A number of 64 bits; ``dtype`` is what the loader gives, e.g. of a float32 scalar."""

    dtype: Literal["float32", "float64"] = "float64"


@dataclass(frozen=True)
class Classes:
    """A name out of a list, stored as its position in the list."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if len(set(self.names)) != len(self.names) or not self.names:
            raise ValueError(f"the class names {self.names!r} are empty or not distinct")


@dataclass(frozen=True)
class Array:
    """Numbers of one type in one shape, the same in every sample."""

    dtype: str  # numpy's name, "float32"
    shape: tuple[int, ...]  # at least one axis, no axis of length 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))


@dataclass(frozen=True)
class Bytes:
    """Bytes or one-dimensional uint8 arrays, of any length."""


@dataclass(frozen=True)
class Json:
    """Whatever JSON can hold: text, lists, mappings with text keys."""


Kind = Union[Image, Int, Float, Classes, Array, Bytes, Json]

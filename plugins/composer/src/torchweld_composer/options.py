"""Options of the four named surgeries, with Composer's names, defaults and ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BlurPoolOptions:
    """Options of ``blurpool``."""

    replace_convs: bool = True  # replace strided convolutions
    replace_maxpools: bool = True  # replace max pooling
    blur_first: bool = True  # blur, then convolve; False: as in the paper, about 10 % slower
    min_channels: int = 16  # leave convolutions with fewer input channels as they are, >= 1

    def __post_init__(self) -> None:
        if not self.replace_convs and not self.replace_maxpools:
            raise ValueError(
                "replace_convs=False and replace_maxpools=False leave nothing to replace; "
                "set one of them to True"
            )
        if not is_int(self.min_channels) or self.min_channels < 1:
            raise ValueError(f"min_channels={self.min_channels!r} is not an integer >= 1")


@dataclass(frozen=True)
class ChannelsLastOptions:
    """Options of ``channels_last``."""

    weights: bool = True  # also the weights become NHWC, as in Composer; False: only the inputs


@dataclass(frozen=True)
class CutMixOptions:
    """Options of ``cutmix``."""

    alpha: float = 1.0  # both parameters of the Beta distribution of the mixed area, > 0
    interpolate_loss: bool = False  # mix two losses instead of the targets
    uniform_sampling: bool = False  # every pixel is mixed equally often

    def __post_init__(self) -> None:
        require_positive("alpha", self.alpha)


@dataclass(frozen=True)
class LabelSmoothingOptions:
    """Options of ``label_smoothing``."""

    smoothing: float = 0.1  # weight of the uniform distribution, in [0, 1]

    def __post_init__(self) -> None:
        if not is_number(self.smoothing) or not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing={self.smoothing!r} is not a number in [0, 1]")


def require_positive(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above 0."""
    if not is_number(value) or not 0 < float(str(value)) < math.inf:
        raise ValueError(f"{name}={value!r} is not a finite number > 0")


def is_int(value: object) -> bool:
    """Whether ``value`` is an integer; ``True`` and ``False`` are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number; ``True`` and ``False`` are none."""
    return is_int(value) or isinstance(value, float)

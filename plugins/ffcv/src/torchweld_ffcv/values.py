"""What the values of a sample are, whichever library they come from."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchweld.guard import attempt, one_line
from torchweld_ffcv.errors import ValueRefused

_LONGEST = 40


@dataclass(frozen=True)
class ImageFile:
    """A picture as the bytes of its file."""

    path: str
    data: bytes

    def open(self) -> Any:
        """Decode it to a PIL image.

        Raises:
            ValueRefused: PIL cannot read it.
        """
        from PIL import Image, UnidentifiedImageError

        image = attempt(lambda: _loaded(Image.open(io.BytesIO(self.data))))
        if image.error is not None:  # PIL raises what its many formats like: OSError, SyntaxError
            unknown = isinstance(image.error, UnidentifiedImageError)
            reason = "it is no image of a known format" if unknown else one_line(image.error)
            raise ValueRefused(f"is {self.path!r}, which PIL cannot read: {reason}")
        return image.value


def _loaded(image: Any) -> Any:
    image.load()
    return image


def is_pil_image(value: object) -> bool:
    """Whether ``value`` is a PIL image; if it is, PIL has been imported."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a torch tensor; if it is, torch has been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(value: Any) -> np.ndarray[Any, Any] | None:
    """An array or tensor as an array that shares its memory, else None.

    Raises:
        ValueRefused: numpy has no such type, as for bfloat16.
    """
    if isinstance(value, np.ndarray):
        return value
    if not is_tensor(value):
        return None
    array = attempt(lambda: value.detach().cpu().numpy())
    if array.error is not None:
        raise ValueRefused(f"is {describe(value)}, which numpy cannot hold: give it as float32")
    return array.value


def scalar(value: Any) -> bool | int | float | None:
    """A number, or an array or tensor without axes, as Python's number; else None."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, np.generic) or ((array := as_array(value)) is not None and not array.ndim):
        number = value.item()
        return number if isinstance(number, (bool, int, float)) else None
    return None


def scalar_dtype(value: Any) -> str:
    """Numpy's name of the type of a number; Python's float is float64."""
    dtype = getattr(value, "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else type(value).__name__


def describe(value: Any) -> str:
    """A few words for a message: ``'cat' (str)``, ``a uint8 array of shape (3, 32, 32)``."""
    if is_pil_image(value):
        return f"a PIL image of mode {value.mode!r}, {value.width}x{value.height}"
    if isinstance(value, ImageFile):
        return f"the file {value.path!r}"
    if isinstance(value, np.ndarray) or is_tensor(value):
        word = "a tensor" if is_tensor(value) else "an array"
        return f"{word} of {scalar_dtype(value)} with shape {tuple(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of length {len(value)}"
    text = f"{value!r}" if not isinstance(value, Mapping) else f"keys {list(value)!r}"
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return f"{text} ({type(value).__name__})"

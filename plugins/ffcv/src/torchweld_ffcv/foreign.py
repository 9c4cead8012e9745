"""FFCV's own field objects, as its documentation has them, as the kinds of this plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchweld.errors import InvalidArgument
from torchweld_ffcv.kinds import Array, Bytes, Float, Image, Int, Json, Kind

_STORES: Mapping[str, str] = {"raw": "raw", "jpg": "jpeg"}


def kinds_of(fields: Mapping[str, Any] | None) -> dict[str, Kind] | None:
    """Translate FFCV's fields (``RGBImageField(write_mode="jpg")``); kinds stay as they are.

    Raises:
        InvalidArgument: a field of FFCV has no kind.
    """
    if fields is None:
        return None
    return {name: _kind(name, one) for name, one in fields.items()}


def _kind(name: str, field: Any) -> Any:
    if not type(field).__module__.startswith("ffcv.fields"):
        return field  # a kind, or something that is refused where kinds are looked at
    word = type(field).__name__
    if word == "RGBImageField":
        return _image(name, field)
    if word in {"NDArrayField", "TorchTensorField"}:
        return Array(np.dtype(field.dtype).name, tuple(field.shape))
    plain: dict[str, Kind] = {
        "IntField": Int(),
        "FloatField": Float(),
        "BytesField": Bytes(),
        "JSONField": Json(),
    }
    if word not in plain:
        raise InvalidArgument(
            f"fields[{name!r}] is FFCV's {word}, which is not written here; "
            "use a record of torchweld_ffcv.kinds"
        )
    return plain[word]


def _image(name: str, field: Any) -> Image:
    if field.write_mode not in _STORES:
        raise InvalidArgument(
            f"fields[{name!r}] has write_mode={field.write_mode!r}, which decides for each "
            "picture; use 'raw', 'jpg', or Image(store='auto') of torchweld_ffcv.kinds, which "
            "keeps the bytes of JPEG files"
        )
    store: Any = _STORES[field.write_mode]
    return Image(store, field.jpeg_quality, field.max_resolution)

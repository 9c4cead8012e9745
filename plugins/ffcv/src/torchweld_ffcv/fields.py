"""Encode the values of a sample; each is checked before a byte of it is written.

FFCV's own fields write what they are given: they cut 0.7 to 0, take 8 rows of pixels for 8 colour
channels, and raise inside a worker whose error nobody hears.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from torchweld.guard import attempt, one_line
from torchweld_ffcv import layout
from torchweld_ffcv.errors import ValueRefused
from torchweld_ffcv.kinds import Array, Bytes, Classes, Float, Int, Json, Kind
from torchweld_ffcv.kinds import Image as ImageKind
from torchweld_ffcv.pictures import ImageEncoder
from torchweld_ffcv.values import as_array, describe, scalar

Put = Callable[[Any], int]
"""Write bytes or a contiguous array into the file's data and return where they lie."""

_INT64 = np.iinfo(np.int64)
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_STORABLE = ("bool", *_INTEGERS, "float32", "float64")


class Encoder(Protocol):
    """One field: what FFCV's tables say about it, and how a value is written."""

    @property
    def kind(self) -> Any:
        """What was asked for or found out."""

    @property
    def type_id(self) -> int:
        """FFCV's number of the field type."""

    def arguments(self) -> bytes:
        """For the field's descriptor."""

    def described(self) -> Mapping[str, Any]:
        """For the manifest; plain JSON."""

    def encode(self, value: Any, put: Put) -> Any:
        """Write a value; returns its row of metadata.

        Raises:
            ValueRefused: the value does not fit the field.
        """


def encoder(kind: Kind, example: Any) -> Encoder:
    """Return what encodes a field of this kind; ``example`` decides how pictures are laid out."""
    if isinstance(kind, ImageKind):
        return ImageEncoder(kind, example)
    if isinstance(kind, Array):
        return ArrayEncoder(kind)
    made: dict[type, Callable[[Any], Encoder]] = {
        Int: IntEncoder,
        Float: FloatEncoder,
        Classes: ClassesEncoder,
        Bytes: BytesEncoder,
        Json: JsonEncoder,
    }
    if type(kind) not in made:
        raise ValueRefused(
            f"has the kind {describe(kind)}; the kinds are Image, Int, Float, Classes, Array, "
            "Bytes and Json of torchweld_ffcv.kinds"
        )
    return made[type(kind)](kind)


@dataclass(frozen=True)
class IntEncoder:
    """Whole numbers, as int64."""

    kind: Int
    type_id: int = layout.INT

    def arguments(self) -> bytes:
        """None."""
        return b""

    def described(self) -> Mapping[str, Any]:
        """The type that the loader gives."""
        return {"dtype": "int64"}

    def encode(self, value: Any, put: Put) -> int:
        """Check that it is whole and fits 64 bits."""
        number = scalar(value)
        if not isinstance(number, int):
            raise ValueRefused(f"is {describe(value)}, not a whole number; {_remedy(value)}")
        if not _INT64.min <= number <= _INT64.max:
            raise ValueRefused(f"is {number}, which does not fit 64 bits; map it to a smaller one")
        return number


@dataclass(frozen=True)
class FloatEncoder:
    """Numbers, as float64."""

    kind: Float
    type_id: int = layout.FLOAT

    def arguments(self) -> bytes:
        """None."""
        return b""

    def described(self) -> Mapping[str, Any]:
        """The type that the loader gives."""
        return {"dtype": self.kind.dtype}

    def encode(self, value: Any, put: Put) -> float:
        """Check that it is a number."""
        number = scalar(value)
        if number is None:
            raise ValueRefused(f"is {describe(value)}, not a number; {_remedy(value)}")
        return float(number)


class ClassesEncoder:
    """Names out of a list, as their positions."""

    type_id = layout.INT

    def __init__(self, kind: Classes) -> None:
        self.kind = kind
        self._positions = {name: position for position, name in enumerate(kind.names)}

    def arguments(self) -> bytes:
        """None."""
        return b""

    def described(self) -> Mapping[str, Any]:
        """The names, in order."""
        return {"dtype": "int64", "classes": list(self.kind.names)}

    def encode(self, value: Any, put: Put) -> int:
        """Look the name up."""
        if not isinstance(value, str) or value not in self._positions:
            names = ", ".join(map(repr, self.kind.names[:5]))
            more = ", …" if len(self.kind.names) > 5 else ""
            raise ValueRefused(f"is {describe(value)}, none of the classes {names}{more}")
        return self._positions[value]


class ArrayEncoder:
    """Arrays and tensors of one type and shape."""

    type_id = layout.ARRAY

    def __init__(self, kind: Array) -> None:
        if kind.dtype not in _STORABLE:
            raise ValueRefused(
                f"is an array of {kind.dtype}, which FFCV cannot read back; give it as "
                f"{'float32' if kind.dtype == 'float16' else 'one of ' + ', '.join(_STORABLE)}"
            )
        if not kind.shape or 0 in kind.shape:
            raise ValueRefused(f"has the shape {kind.shape}, and there is nothing in it to store")
        self.kind = kind
        self._dtype = np.dtype(kind.dtype).newbyteorder("<")

    def arguments(self) -> bytes:
        """Element type and shape."""
        return layout.array_arguments(self._dtype, self.kind.shape)

    def described(self) -> Mapping[str, Any]:
        """Element type and shape."""
        return {"dtype": self.kind.dtype, "shape": list(self.kind.shape)}

    def encode(self, value: Any, put: Put) -> int:
        """Check type and shape."""
        array = as_array(value)
        if array is None and isinstance(value, (list, tuple)):
            array = attempt(np.asarray, value).value
        wanted = f"{self.kind.dtype} of shape {self.kind.shape}"
        if array is None or not np.can_cast(array.dtype, self._dtype, "safe"):
            raise ValueRefused(f"is {describe(value)}, and the field holds {wanted}")
        if array.shape != self.kind.shape:
            raise ValueRefused(
                f"is {describe(value)}, and the field holds {wanted}; pad it to one shape in the "
                "dataset, or store it as Bytes() or Json()"
            )
        return put(np.ascontiguousarray(array, self._dtype))


@dataclass(frozen=True)
class BytesEncoder:
    """Bytes of any length."""

    kind: Bytes
    type_id: int = layout.BYTES

    def arguments(self) -> bytes:
        """None."""
        return b""

    def described(self) -> Mapping[str, Any]:
        """Nothing to add."""
        return {}

    def encode(self, value: Any, put: Put) -> tuple[int, int]:
        """Check that it is bytes."""
        array = as_array(value)
        if array is not None and array.dtype == np.uint8 and array.ndim == 1:
            data = array.tobytes()
        elif isinstance(value, (bytes, bytearray, memoryview)):
            data = bytes(value)
        else:
            raise ValueRefused(
                f"is {describe(value)}, neither bytes nor a one-dimensional uint8 array"
            )
        if not data:
            # FFCV finds the size of a region by its address, which an empty one shares with the
            # next; it would read that one into a buffer made for none.
            raise ValueRefused("is empty, and FFCV cannot read that back; store one byte at least")
        return put(data), len(data)


@dataclass(frozen=True)
class JsonEncoder:
    """What JSON can hold, as UTF-8 with a zero byte behind it."""

    kind: Json
    type_id: int = layout.JSON

    def arguments(self) -> bytes:
        """None."""
        return b""

    def described(self) -> Mapping[str, Any]:
        """Nothing to add."""
        return {}

    def encode(self, value: Any, put: Put) -> tuple[int, int]:
        """Check that JSON can hold it."""
        text = attempt(json.dumps, value, ensure_ascii=False)
        if text.value is None:
            reason = one_line(text.error) if text.error else ""
            raise ValueRefused(f"is {describe(value)}, which JSON cannot hold: {reason}")
        data = text.value.encode() + b"\0"
        return put(data), len(data)


def kind_data(kind: Kind) -> dict[str, Any]:
    """A kind as plain JSON, for the manifest and the fingerprint."""
    return {"kind": type(kind).__name__, **asdict(kind)}


def _remedy(value: Any) -> str:
    if isinstance(value, str):
        return (
            "map it to an int in the dataset, or list the names: "
            f"Classes([{value!r}, …]) of torchweld_ffcv.kinds"
        )
    if isinstance(value, float):
        return "store fractions with Float() of torchweld_ffcv.kinds"
    if value is None:
        return "leave such samples out (skip_bad) or give them a value in the dataset"
    return "store it with another kind of torchweld_ffcv.kinds, such as Array(dtype, shape)"

"""The fields of a dataset's samples, found out from the first few or given by the user."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from torchweld.guard import attempt
from torchweld_ffcv import layout
from torchweld_ffcv.errors import ConversionError, ValueRefused
from torchweld_ffcv.fields import Encoder, Put, encoder, kind_data
from torchweld_ffcv.kinds import Array, Bytes, Float, Image, Int, Json, Kind
from torchweld_ffcv.values import (
    ImageFile,
    as_array,
    describe,
    is_pil_image,
    scalar,
    scalar_dtype,
)


@dataclass(frozen=True)
class SampleFields:
    """How one sample becomes one row: its names, and what encodes each.

    Attributes:
        container: ``"tuple"``, ``"mapping"``, or ``"single"`` for a bare value.
        names: of the fields, in order.
        encoders: one a field.
    """

    container: str
    names: tuple[str, ...]
    encoders: tuple[Encoder, ...]

    @property
    def stored_names(self) -> tuple[str, ...]:
        """What FFCV calls the fields: at most 16 ASCII characters, all different."""
        taken: list[str] = []
        for position, name in enumerate(self.names):
            plain = re.sub(r"[^!-~]", "_", name) or "_"
            fits = plain == name and len(name) <= layout.NAME_BYTES and name not in taken
            taken.append(name if fits else f"{plain[:11]}_{position}"[: layout.NAME_BYTES])
        return tuple(taken)

    @property
    def metadata_dtype(self) -> np.dtype[Any]:
        """The type of one row."""
        return layout.metadata_dtype([layout.METADATA[e.type_id] for e in self.encoders])

    def encode(self, sample: Any, put: Put) -> tuple[Any, ...]:
        """Write the sample's values; returns its row.

        Raises:
            ValueRefused: names the field whose value does not fit.
        """
        parts = zip(self.names, self.encoders, self.values(sample), strict=True)
        return tuple(_encoded(name, one, value, put) for name, one, value in parts)

    def values(self, sample: Any) -> Sequence[Any]:
        """The values of a sample, in the order of ``names``.

        Raises:
            ValueRefused: the sample is made differently from the first ones.
        """
        if self.container == "single":
            return (sample,)
        if self.container == "mapping":
            missing = [name for name in self.names if name not in _keys(sample)]
            if missing:
                raise ValueRefused(f"it is {describe(sample)}, without the key {missing[0]!r}")
            return [sample[name] for name in self.names]
        if not isinstance(sample, (tuple, list)) or len(sample) != len(self.names):
            raise ValueRefused(
                f"it is {describe(sample)}, and the first samples had {len(self.names)} values"
            )
        return sample

    def described(self) -> list[dict[str, Any]]:
        """The fields for the manifest."""
        return [
            {"name": name, "stored_name": stored, **kind_data(one.kind), **one.described()}
            for name, stored, one in zip(self.names, self.stored_names, self.encoders, strict=True)
        ]

    def descriptors(self) -> bytes:
        """The field table."""
        rows = zip(self.stored_names, self.encoders, strict=True)
        return layout.descriptors([(one.type_id, name, one.arguments()) for name, one in rows])


def find_fields(
    samples: Sequence[Any],
    fields: Mapping[str, Kind] | None,
    *,
    names: Iterable[str] = (),
    pictures: Mapping[str, Any] | None = None,
) -> SampleFields:
    """Find out the fields from the first samples, or check those that were given.

    Args:
        samples: the first ones, at least one.
        fields: what the user gave: all fields of a tuple in order, or some keys of a mapping.
        names: of the fields where the source knows them.
        pictures: options that every field found to be a picture gets.

    Raises:
        ConversionError: a value has no kind, or what was given does not fit the samples.
    """
    container = _container(samples[0])
    columns = _columns(samples, container, fields)
    given = dict(fields or {})
    kinds = [
        given[name] if name in given else _kind_of(name, values) for name, values in columns.items()
    ]
    kinds = [
        replace(kind, **pictures) if pictures and isinstance(kind, Image) else kind
        for kind in kinds
    ]
    if container != "mapping" and not given:
        columns = _named(columns, kinds, tuple(names) or getattr(samples[0], "_fields", ()))
    encoders = [
        _encoder(name, kind, values[0])
        for (name, values), kind in zip(columns.items(), kinds, strict=True)
    ]
    return SampleFields(container, tuple(columns), tuple(encoders))


def _encoded(name: str, one: Encoder, value: Any, put: Put) -> Any:
    try:
        return one.encode(value, put)
    except ValueRefused as error:
        raise ValueRefused(f"its {_called(name)} {error}") from error


def _called(name: str) -> str:
    """The values of a tuple have no names yet while their kinds are found out."""
    return f"value {name}" if name.isdigit() else f"field {name!r}"


def _container(sample: Any) -> str:
    if isinstance(sample, Mapping):
        return "mapping"
    return "tuple" if isinstance(sample, (tuple, list)) else "single"


def _keys(sample: Any) -> Iterable[Any]:
    return sample if isinstance(sample, Mapping) else ()


def _columns(
    samples: Sequence[Any], container: str, fields: Mapping[str, Kind] | None
) -> dict[str, list[Any]]:
    """The values of the first samples by field."""
    first = samples[0]
    if container == "mapping":
        names = list(first) if fields is None else list(fields)
        wrong = [name for name in first if not isinstance(name, str)]
        if wrong:
            raise ConversionError(f"sample 0 has the key {wrong[0]!r}, which is no text", 0)
    else:
        width = len(first) if container == "tuple" else 1
        names = [str(i) for i in range(width)] if fields is None else list(fields)
        if fields is not None and len(names) != width:
            raise ConversionError(
                f"fields= names {len(names)} fields ({', '.join(names)}), and sample 0 has {width} "
                f"values: {describe(first)}; name them all, in their order",
                0,
            )
    if not names:
        raise ConversionError("sample 0 has no values, so there is nothing to store", 0)
    shape = SampleFields(container, tuple(names), ())
    rows = [_values(shape, sample, index) for index, sample in enumerate(samples)]
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _values(shape: SampleFields, sample: Any, index: int) -> Sequence[Any]:
    try:
        return shape.values(sample)
    except ValueRefused as error:
        raise ConversionError(f"sample {index} cannot be stored: {error}", index) from error


def _named(
    columns: Mapping[str, list[Any]], kinds: Sequence[Kind], known: tuple[str, ...]
) -> dict[str, list[Any]]:
    """Columns under names people would give: ``image`` and ``label`` for the usual pair."""
    if len(known) != len(columns):
        guesses = [_guess(kind, position) for position, kind in enumerate(kinds)]
        known = tuple(
            name if guesses.count(name) == 1 else f"{name}{position}"
            for position, name in enumerate(guesses)
        )
    return dict(zip(known, columns.values(), strict=True))


def _guess(kind: Kind, position: int) -> str:
    if isinstance(kind, Image):
        return "image"
    if isinstance(kind, (Int, Float)):
        return "label"
    return "input" if position == 0 else "target"


def _encoder(name: str, kind: Kind, example: Any) -> Encoder:
    try:
        return encoder(kind, example)
    except ValueRefused as error:
        raise ConversionError(f"{_called(name)} {error}") from error


# ---- kinds from values -------------------------------------------------------------------------


def _kind_of(name: str, values: Sequence[Any]) -> Kind:
    kinds = [_kind_of_value(name, index, value) for index, value in enumerate(values)]
    first = kinds[0]
    if {type(kind) for kind in kinds} == {Int, Float}:
        return next(kind for kind in kinds if isinstance(kind, Float))
    if len(set(kinds)) > 1 and all(_is_flat_bytes(kind) for kind in kinds):
        return Bytes()
    return first


def _kind_of_value(name: str, index: int, value: Any) -> Kind:
    try:
        return infer_kind(value)
    except ValueRefused as error:
        message = f"sample {index} cannot be stored: its {_called(name)} {error}"
        raise ConversionError(message, index) from error


def infer_kind(value: Any) -> Kind:
    """The kind that stores ``value`` without loss.

    Raises:
        ValueRefused: there is none, or several would do and only the user can say which.
    """
    if isinstance(value, ImageFile):
        return Image(to_rgb=True)  # as torchvision's own loader of image folders
    if is_pil_image(value):
        return Image()
    if isinstance(value, str):
        raise ValueRefused(
            f"holds text ({describe(value)}); map it to an int in the dataset, or say how to store "
            f"it: Classes([{value!r}, …]) for class names, Json() for any text, both of "
            "torchweld_ffcv.kinds"
        )
    if isinstance(value, (bytes, bytearray)):
        return Bytes()
    number = scalar(value)
    if number is not None:
        return _kind_of_number(number, value)
    array = as_array(value)
    if array is not None:
        return _kind_of_array(array)
    if isinstance(value, (Mapping, list, tuple)) and attempt(json.dumps, value).value is not None:
        return Json()
    raise ValueRefused(f"is {describe(value)}, for which FFCV has no field; leave it out or map it")


def _kind_of_number(number: bool | int | float, value: Any) -> Kind:
    if isinstance(number, int):
        return Int()
    return Float("float32" if scalar_dtype(value) in {"float32", "float16"} else "float64")


def _kind_of_array(array: np.ndarray[Any, Any]) -> Kind:
    if array.dtype == np.uint8 and array.ndim == 3 and 3 in {array.shape[0], array.shape[2]}:
        return Image(store="raw")
    return Array(array.dtype.name, array.shape)


def _is_flat_bytes(kind: Kind) -> bool:
    return isinstance(kind, Array) and kind.dtype == "uint8" and len(kind.shape) == 1

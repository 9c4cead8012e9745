"""The spec of a file: what the user chose, and for every other field what it is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torchweld.errors import InvalidArgument
from torchweld_ffcv.beton import Beton, Field
from torchweld_ffcv.spec import (
    UNIT,
    AsStored,
    FieldSpec,
    ImageSpec,
    Layout,
    Normalize,
    NumberSpec,
    Skip,
)


def fit_spec(
    beton: Beton, chosen: Mapping[str, object], *, train: bool, channels_last: bool
) -> dict[str, FieldSpec]:
    """Return what is done with every field of ``beton``.

    Args:
        beton: the file.
        chosen: the user's, for some of the fields.
        train: whether chance takes part; otherwise the middle is cut out and nothing is flipped.
        channels_last: the layout of images where the user chose none.

    Raises:
        InvalidArgument: a field does not exist, or cannot be read in that way.
    """
    _refuse_unknown(beton, chosen)
    spec: dict[str, FieldSpec] = {}
    for field in beton.fields:
        one = chosen.get(field.name, chosen.get(field.stored_name))
        fitted = _default(beton, field) if one is None else _checked(beton, field, one)
        spec[field.name] = _settled(fitted, train=train, channels_last=channels_last)
    if all(isinstance(one, Skip) for one in spec.values()):
        raise InvalidArgument(f"spec= leaves out every field of {beton.path}: keep one")
    return spec


def _settled(spec: FieldSpec, *, train: bool, channels_last: bool) -> FieldSpec:
    if not isinstance(spec, ImageSpec):
        return spec
    spec = spec if train else spec.for_evaluation()
    layout: Layout = "channels_last" if channels_last else "contiguous"
    return spec if spec.layout is not None else replace(spec, layout=layout)


def _refuse_unknown(beton: Beton, chosen: Mapping[str, object]) -> None:
    known = {name for field in beton.fields for name in (field.name, field.stored_name)}
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InvalidArgument(
            f"{beton.path} has no field {unknown[0]!r}: its fields are "
            f"{', '.join(repr(field.name) for field in beton.fields)}"
        )


def _default(beton: Beton, field: Field) -> FieldSpec:
    """What a DataLoader would give of the samples that were stored."""
    if field.kind == "image":
        return ImageSpec(normalize=_default_normalize(field))
    if field.kind == "int":
        return NumberSpec("int64")
    if field.kind == "float":
        return NumberSpec("float32" if field.dtype == "float32" else "float64")
    if field.kind == "custom":
        raise InvalidArgument(
            f"field {field.name!r} of {beton.path} is of a type of its own, which only its own "
            "decoder can read: give pipelines= with that decoder, or spec={name: skip()}"
        )
    return AsStored()


def _default_normalize(field: Field) -> Normalize | None:
    # A uint8 tensor (3, height, width) comes as it is; what was no tensor becomes floats in [0, 1].
    return None if field.axes == "chw" else UNIT


def _checked(beton: Beton, field: Field, chosen: object) -> FieldSpec:
    fits = {
        "image": ImageSpec,
        "int": NumberSpec,
        "float": NumberSpec,
    }
    if isinstance(chosen, Skip):
        return chosen
    if isinstance(chosen, fits.get(field.kind, AsStored)):
        return chosen  # type: ignore[return-value]  # one of the classes above
    readable = {"image": "image(…)", "int": "int64()", "float": "float32() or float64()"}
    raise InvalidArgument(
        f"field {field.name!r} of {beton.path} holds {field.kind} and cannot be read as "
        f"{chosen!r}: use {readable.get(field.kind, 'nothing, it is read as it is stored,')} or "
        "skip()"
    )

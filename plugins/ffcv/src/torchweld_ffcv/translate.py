"""From torchvision's transforms to a spec, where there is one that does the same.

Works on the classes' names, of torchvision's v1 and v2 alike, and imports nothing: whoever made a
transform has imported torchvision already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchweld_ffcv.spec import UNIT, ImageSpec, Normalize

_NOTHING = ("ToImage", "PILToTensor", "ToPureTensor", "ToImageTensor", "Identity", "RGB")


@dataclass(frozen=True)
class Translation:
    """What became of a transform.

    Attributes:
        spec: what does the same, or None.
        refused: what has no equivalent, each with the reason.
    """

    spec: ImageSpec | None
    refused: tuple[str, ...] = ()


class Untranslatable(Exception):
    """One transform has no equivalent; the message says why."""


@dataclass(frozen=True)
class _Sofar:
    """The transforms up to here, as a spec."""

    spec: ImageSpec
    shorter_side: int = 0  # after Resize(int), before what is cut out of it
    flips: bool = False
    floats: bool = False
    normalized: bool = False


def translate(transform: object) -> Translation:
    """Return the spec that does what ``transform`` does with an image.

    Sizes, places and probabilities are the same; the random numbers are others.
    """
    sofar = _Sofar(ImageSpec(interpolation="bilinear", normalize=None))
    refused = []
    for one in _flat(transform):
        try:
            sofar = _translated(sofar, one)
        except Untranslatable as reason:  # noqa: PERF203 - all of them are named at once
            refused.append(f"{type(one).__name__} ({reason})")
    if sofar.shorter_side and not refused:
        refused.append(
            f"Resize({sofar.shorter_side}) (images of different shapes cannot form a batch: add "
            "CenterCrop, or give height and width)"
        )
    if refused:
        return Translation(None, tuple(refused))
    spec = sofar.spec
    if sofar.floats and not sofar.normalized:
        spec = replace(spec, normalize=UNIT)
    return Translation(spec)


def _flat(transform: object) -> Iterator[object]:
    """One after the other, out of ``Compose`` and ``nn.Sequential``."""
    name = type(transform).__name__
    if name in {"Compose", "Sequential"}:
        parts: Any = transform
        for part in parts.transforms if name == "Compose" else parts:
            yield from _flat(part)
    else:
        yield transform


def _translated(sofar: _Sofar, transform: Any) -> _Sofar:
    name, module = type(transform).__name__, type(transform).__module__
    ours = module.startswith(("torchvision.", "torch.nn"))
    if ours and name in _NOTHING:
        return sofar
    rule = _RULES.get(name) if ours else None
    if rule is None:
        raise Untranslatable("it has no compiled equivalent")
    if sofar.normalized:
        raise Untranslatable("it comes after Normalize")
    return rule(sofar, transform)


def _random_resized_crop(sofar: _Sofar, transform: Any) -> _Sofar:
    _refuse_second_crop(sofar)
    _require_bilinear(transform)
    scale, ratio = tuple(transform.scale), tuple(transform.ratio)
    spec = replace(
        sofar.spec, crop="random_resized", size=_pair(transform.size), scale=scale, ratio=ratio
    )
    return replace(sofar, spec=spec)


def _resize(sofar: _Sofar, transform: Any) -> _Sofar:
    _refuse_second_crop(sofar)
    _require_bilinear(transform)
    if getattr(transform, "max_size", None) is not None:
        raise Untranslatable("max_size= gives images of different shapes")
    size = transform.size
    if isinstance(size, int) or len(size) == 1:
        return replace(sofar, shorter_side=size if isinstance(size, int) else size[0])
    return replace(sofar, spec=replace(sofar.spec, size=_pair(size)))


def _center_crop(sofar: _Sofar, transform: Any) -> _Sofar:
    if not sofar.shorter_side:
        raise Untranslatable("only after Resize with one number")
    size = _pair(transform.size)
    if sofar.shorter_side < max(size):
        raise Untranslatable(f"it is larger than Resize({sofar.shorter_side}) and would pad")
    spec = replace(sofar.spec, crop="shorter_side", size=size, resize=sofar.shorter_side)
    return replace(sofar, spec=spec, shorter_side=0)


def _random_crop(sofar: _Sofar, transform: Any) -> _Sofar:
    _refuse_second_crop(sofar)
    padding, fill = transform.padding, transform.fill
    padding = padding[0] if _is_uniform(padding) else padding
    if not isinstance(padding, int) and padding is not None:
        raise Untranslatable(f"padding={padding!r} differs between the sides")
    if transform.pad_if_needed:
        raise Untranslatable("pad_if_needed=True")
    if padding and (_any_fill(fill) or transform.padding_mode != "constant"):
        raise Untranslatable("padding with something else than black")
    if sofar.flips and padding is None:
        padding = 0
    spec = replace(sofar.spec, crop="padded", size=_pair(transform.size), padding=int(padding or 0))
    return replace(sofar, spec=spec)


def _flip(sofar: _Sofar, transform: Any) -> _Sofar:
    if sofar.flips:
        raise Untranslatable("there is a flip already")
    return replace(sofar, spec=replace(sofar.spec, flip=float(transform.p)), flips=True)


def _to_float(sofar: _Sofar, _transform: Any) -> _Sofar:
    return replace(sofar, floats=True)


def _to_dtype(sofar: _Sofar, transform: Any) -> _Sofar:
    dtype = str(transform.dtype)
    if dtype == "torch.uint8" and not sofar.floats:
        return sofar
    if dtype != "torch.float32" or not getattr(transform, "scale", True):
        raise Untranslatable("only dtype=torch.float32 with scale=True")
    return replace(sofar, floats=True)


def _normalize(sofar: _Sofar, transform: Any) -> _Sofar:
    if not sofar.floats:
        raise Untranslatable("it comes before the conversion to float32")
    try:
        made = Normalize(tuple(transform.mean), tuple(transform.std))
    except (ValueError, TypeError) as error:
        raise Untranslatable(str(error)) from error
    return replace(sofar, spec=replace(sofar.spec, normalize=made), normalized=True)


_RULES: Mapping[str, Callable[[_Sofar, Any], _Sofar]] = {
    "RandomResizedCrop": _random_resized_crop,
    "Resize": _resize,
    "CenterCrop": _center_crop,
    "RandomCrop": _random_crop,
    "RandomHorizontalFlip": _flip,
    "ToTensor": _to_float,
    "ToDtype": _to_dtype,
    "ConvertImageDtype": _to_dtype,
    "Normalize": _normalize,
}


def _refuse_second_crop(sofar: _Sofar) -> None:
    if sofar.spec.size is not None or sofar.shorter_side:
        raise Untranslatable("the image has been cut or resized already")


def _require_bilinear(transform: Any) -> None:
    mode = getattr(transform.interpolation, "value", transform.interpolation)
    if mode not in {"bilinear", 2}:
        raise Untranslatable(f"interpolation={mode!r}, only bilinear is compiled")
    if getattr(transform, "antialias", True) is False:
        raise Untranslatable("antialias=False")


def _pair(size: Any) -> tuple[int, int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return int(sizes[0]), int(sizes[-1])


def _is_uniform(padding: Any) -> bool:
    return isinstance(padding, (list, tuple)) and len(set(padding)) == 1


def _any_fill(fill: Any) -> bool:
    values = fill.values() if isinstance(fill, Mapping) else [fill]
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    return any(value not in {0, None} for value in flat)

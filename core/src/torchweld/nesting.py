"""Tensors inside whatever a batch or an output is: mappings, sequences, dataclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def map_tensors(value: Any, function: Callable[[Any], Any], attribute: str | None = None) -> Any:
    """Return ``value`` with ``function`` applied to every tensor in it.

    Goes through mappings (also ``UserDict`` and its kin, which a pytree map takes for leaves),
    tuples, named tuples, lists and dataclasses; containers are copied, never changed in place.
    Anything else is returned as it is.

    Args:
        attribute: ``function`` is also applied to what has it, without looking inside.
    """
    if isinstance(value, Tensor) or (attribute is not None and hasattr(value, attribute)):
        return function(value)
    if isinstance(value, Mapping):
        return _map_mapping(value, function, attribute)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function, attribute) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if f.init]
        return replace(
            value, **{n: map_tensors(getattr(value, n), function, attribute) for n in names}
        )
    return value


def _map_mapping(
    value: Mapping[Any, Any], function: Callable[[Any], Any], attribute: str | None
) -> Any:
    items = {key: map_tensors(item, function, attribute) for key, item in value.items()}
    if type(value) is dict or not isinstance(value, MutableMapping):
        return items
    result = copy.copy(value)
    for key, item in items.items():
        result[key] = item
    return result


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in ``value``, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from tensors(getattr(value, f.name))


def move(value: Any, device: torch.device) -> Any:
    """Return ``value`` on ``device``; page-locked tensors are copied without waiting.

    What has ``.to(device)`` of its own is moved by it, wherever it stands: a packed sequence, say,
    which is a tuple with a part that has to stay on the CPU.
    """
    if type(value) in {tuple, list} and len(value) == 2:
        first, second = value
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            # The usual batch, in every step: a walk over containers costs nine Python calls.
            first, second = (
                first.to(device, non_blocking=True),
                second.to(device, non_blocking=True),
            )
            return [first, second] if type(value) is list else (first, second)

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device)

    return map_tensors(value, moved, attribute="to")


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Return ``value`` with every floating tensor cast to ``dtype``; integers stay."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return map_tensors(value, lambda t: t.to(dtype) if t.is_floating_point() else t)


def num_samples(batch: Any) -> int:
    """Leading dimension of the first tensor in ``batch``, else the length of its first item."""
    if (
        isinstance(batch, (tuple, list))
        and batch
        and isinstance(batch[0], Tensor)
        and batch[0].dim()
    ):
        return int(batch[0].shape[0])  # the usual pair, without looking further
    first = next((tensor for tensor in tensors(batch) if tensor.dim() > 0), None)
    if first is not None:
        return int(first.shape[0])
    if isinstance(batch, (tuple, list)) and batch and hasattr(batch[0], "__len__"):
        return len(batch[0])
    return 1


def shapes(value: Any) -> str:
    """Describe the tensors in ``value`` for a message: ``(8, 3, 32, 32) float32, (8,) int64``."""
    return (
        ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors(value))
        or type(value).__name__
    )

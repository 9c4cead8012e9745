"""What a batch goes through before the model: the move to the device, then the transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchweld.nesting import move

if TYPE_CHECKING:
    import torch

Transforms = tuple[Callable[[Any], Any], ...]


def bind_transform(
    device: torch.device, on_device: bool, inputs: Transforms, batches: Transforms = ()
) -> Callable[[Any], Any] | None:
    """Return what a batch goes through as one function, None for nothing.

    Args:
        device: where the batch has to be.
        on_device: the loader puts it there itself.
        inputs: transforms of ``inputs`` of a pair, or of a whole mapping.
        batches: transforms of whole batches, after those.
    """
    moves = device.type != "cpu" and not on_device
    if not (moves or inputs):
        return _chained(batches)

    def transform(batch: Any) -> Any:
        if moves:
            batch = move(batch, device)
        for change in inputs:
            if isinstance(batch, (tuple, list)):
                batch = (change(batch[0]), *batch[1:])
            else:
                batch = change(batch)
        for change in batches:
            batch = change(batch)
        return batch

    return transform


def _chained(transforms: Transforms) -> Callable[[Any], Any] | None:
    if len(transforms) < 2:
        return transforms[0] if transforms else None

    def transform(batch: Any) -> Any:
        for change in transforms:
            batch = change(batch)
        return batch

    return transform

"""Batches as algorithms see them: containers of their own, targets put in and taken out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchweld_composer.imports import composer_module


def own_container(batch: Any) -> Any:
    """A batch whose container may be changed; the tensors are the same.

    Composer's algorithms put their results into a list or mapping in place, and the caller's
    batch may be used again.
    """
    return batch if isinstance(batch, (tuple, Tensor)) else copy.copy(batch)


def with_targets(batch: Any, targets: Any, target_key: Any) -> Any:
    """The batch with other targets.

    Args:
        batch: the one before, None when only the targets are known.
        targets: the whole batch when it is a mapping and the loss takes it all.
        target_key: where the targets of a mapping are, when the loss takes them alone.
    """
    if isinstance(targets, Mapping):
        return own_container(targets)
    if isinstance(batch, Mapping):
        return composer_module("composer.utils").batch_set(
            own_container(batch), key=target_key, value=targets
        )
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else None
    return (inputs, targets)


def targets_of(batch: Any, targets: Any, target_key: Any) -> Any:
    """What :func:`with_targets` put in, as the algorithm left it."""
    if isinstance(targets, Mapping):
        return batch
    if isinstance(batch, Mapping):
        return composer_module("composer.utils").batch_get(batch, target_key)
    return batch[1]

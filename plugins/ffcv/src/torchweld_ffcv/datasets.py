"""What can be taken out of a Dataset or DataLoader so that it may be converted once."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

_TAKEN = (
    "took dataset, batch_size, shuffle and drop_last from the DataLoader; the order comes from the "
    "run's seed, every sample once over all processes"
)


class Unsupported(Exception):
    """This cannot be converted or compiled; the message says what and why."""


@dataclass(frozen=True)
class Given:
    """A Dataset, and how a DataLoader around it reads.

    Attributes:
        dataset: without the DataLoader.
        batch_size: of the DataLoader, or None for the option's.
        shuffle: of the DataLoader, or None for the option's.
        drop_last: of the DataLoader, or None for the option's.
        note: what was taken from the DataLoader; empty without one.
    """

    dataset: Any
    batch_size: int | None = None
    shuffle: bool | None = None
    drop_last: bool | None = None
    note: str = ""


def unwrap_loader(loader: DataLoader[Any]) -> Given:
    """Take a DataLoader apart.

    Raises:
        Unsupported: it does something of its own with samples or their order.
    """
    sampler: Any = loader.sampler
    batches, dataset = loader.batch_sampler, cast("Any", loader.dataset)
    if loader.collate_fn is not default_collate:
        named = getattr(loader.collate_fn, "__name__", type(loader.collate_fn).__name__)
        raise Unsupported(f"the DataLoader's collate_fn ({named})")
    if isinstance(loader.dataset, IterableDataset):
        return Given(loader.dataset, loader.batch_size, None, loader.drop_last, _TAKEN)
    if type(batches) is not BatchSampler:
        raise Unsupported(f"the DataLoader's batch_sampler ({type(batches).__name__})")
    known = type(sampler) in {RandomSampler, SequentialSampler, DistributedSampler}
    if not known or getattr(sampler, "replacement", False):
        raise Unsupported(f"the DataLoader's sampler ({type(sampler).__name__})")
    if len(sampler) != len(dataset) and type(sampler) is not DistributedSampler:
        raise Unsupported(f"the DataLoader's sampler draws {len(sampler)} samples an epoch")
    shuffle = getattr(sampler, "shuffle", type(sampler) is RandomSampler)
    return Given(loader.dataset, loader.batch_size, shuffle, loader.drop_last, _TAKEN)


def without_transform(dataset: Any) -> tuple[Any, Any]:
    """Return a copy of a dataset without its image transform, and the transform (None for none).

    Goes through ``Subset``; everything else is shared with the original, which is left alone.
    """
    if isinstance(dataset, Subset):
        inner, transform = without_transform(dataset.dataset)
        return (dataset if transform is None else Subset(inner, dataset.indices)), transform
    transform = getattr(dataset, "transform", None)
    if transform is None or inspect.ismethod(transform):
        return dataset, None
    bare = copy.copy(dataset)
    if hasattr(bare, "transforms"):  # torchvision keeps both in one more object
        bare.transform, bare.transforms = None, _target_only(bare)
    else:
        bare.transform = _unchanged  # it may be called without asking whether there is one
    return bare, transform


def _unchanged(image: Any) -> Any:
    return image


def _target_only(dataset: Any) -> Any:
    if getattr(dataset, "target_transform", None) is None:
        return None
    both = copy.copy(dataset.transforms)
    both.transform = None
    return both

"""Datasets around the user's: with sample transforms, or every world-th sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset


def _apply(transforms: Sequence[Callable[[Any], Any]], sample: Any) -> Any:
    for transform in transforms:
        sample = transform(sample)
    return sample


def _pass_on(dataset: Any, epoch: int) -> None:
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


class Transformed(Dataset[Any]):
    """A map-style dataset whose samples go through ``transforms``."""

    def __init__(self, dataset: Any, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.dataset, self.transforms = dataset, transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return _apply(self.transforms, self.dataset[index])

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, if it wants to know."""
        _pass_on(self.dataset, epoch)


class TransformedIterable(IterableDataset[Any]):
    """An iterable dataset whose samples go through ``transforms``."""

    def __init__(self, dataset: Any, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.dataset, self.transforms = dataset, transforms

    def __iter__(self) -> Iterator[Any]:
        return (_apply(self.transforms, sample) for sample in self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)  # a TypeError where it has none, as without the transforms

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, if it wants to know."""
        _pass_on(self.dataset, epoch)


class Strided(IterableDataset[Any]):
    """Every ``step``-th sample of an iterable dataset, from ``start`` on."""

    def __init__(self, dataset: Any, start: int, step: int) -> None:
        self.dataset, self.start, self.step = dataset, start, step

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.dataset), self.start, None, self.step)

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, if it wants to know."""
        _pass_on(self.dataset, epoch)

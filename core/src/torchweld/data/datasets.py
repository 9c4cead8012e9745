"""Datasets around the user's: with sample transforms, or every world-th sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from torchweld import rng
from torchweld.data.order import Placed


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


class SeededByPlace(Dataset[Any]):
    """Seeds python, numpy and torch in a worker process anew for each sample that it loads.

    torch gives each worker a random state of its own that moves on with what it happens to load, so
    that a resumed epoch, or another number of workers, has other random numbers. Here they depend
    on the run's seed, the epoch and the place of the sample in its order alone.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Placed) -> Any:
        """Load a batch; one that its dataset loads at once is seeded by its first sample."""
        together = getattr(self.dataset, "__getitems__", None)
        if together is not None:
            _seed(indices, indices.places[0])
            return together(list(indices))
        samples = []
        for index, place in zip(indices, indices.places, strict=True):
            _seed(indices, place)
            samples.append(self.dataset[index])
        return samples

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, if it wants to know."""
        _pass_on(self.dataset, epoch)


def _seed(batch: Placed, place: int) -> None:
    entropy = np.random.SeedSequence([batch.seed, batch.epoch, place])
    rng.seed_sample(int(entropy.generate_state(1)[0]))

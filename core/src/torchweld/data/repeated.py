"""A few batches again and again, for ``overfit_batches``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from torchweld.nesting import map_tensors

if TYPE_CHECKING:
    from torchweld.interfaces import Loader


class RepeatedLoader:
    """Keeps the first batches of a loader and gives them in every epoch, in the same order.

    What was drawn at random for them (shuffling, augmentation) stays as it was drawn.
    """

    owns_batches = True

    def __init__(self, loader: Loader, num_batches: int) -> None:
        self._loader = loader
        self.sharded, self.on_device = loader.sharded, loader.on_device
        self.batch_size, self.num_samples = loader.batch_size, loader.num_samples
        self.num_batches: int | None = num_batches
        self._kept: list[tuple[Any, int]] = []
        self._start = self._samples = 0

    def __iter__(self) -> Iterator[Any]:
        if not self._kept:
            self._loader.set_epoch(0)
            for batch in islice(self._loader, self.num_batches):
                self._kept.append((map_tensors(batch, torch.clone), self._loader.samples(batch)))
        return self._copies(self._start)

    def _copies(self, start: int) -> Iterator[Any]:
        for batch, samples in self._kept[start:]:
            self._samples = samples
            yield map_tensors(batch, torch.clone)  # a transform may change it in place

    def samples(self, batch: Any) -> int:
        """Real samples of the batch just yielded."""
        return self._samples

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Begin again at that batch."""
        self._start = start_batch

    def state_dict(self) -> Mapping[str, object]:
        """The state of the loader whose batches these are."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back."""
        self._loader.load_state_dict(state)

    def close(self) -> None:
        """Close the loader, forget the batches."""
        self._loader.close()
        self._kept.clear()

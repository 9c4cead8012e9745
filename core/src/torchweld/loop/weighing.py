"""The weight of an uneven batch: what makes the mean over ranks the mean over samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torchweld.interfaces import Loader
    from torchweld.loop.recorder import Recorder


class HasBatch(Protocol):
    """A position inside an epoch."""

    batch: int


class Weigher:
    """Weighs the batches of the last window of an epoch.

    Strategies average the ranks' losses. Where a rank has n of the N samples of a global batch, its
    mean counts as n * world_size / N, so that the average is the mean over the N samples: 13
    samples in batches of 4 on two processes train like one process with batches of 8, and a rank
    that has none of them left weighs 0. What is noted beside the loss is weighed like it.

    Attributes:
        seen: real samples of the batches weighed since :meth:`restart`.
    """

    def __init__(
        self, loader: Loader, world_size: int, position: HasBatch, recorder: Recorder
    ) -> None:
        self._loader, self._world_size, self._position = loader, world_size, position
        self._recorder = recorder
        self.seen: list[int] = []

    def restart(self) -> None:
        """Begin a window."""
        self.seen = []

    def weigh(self, raw: Any) -> float:
        """Return the weight of the batch that the loader has just given."""
        total = self._global_samples(self._position.batch + len(self.seen))
        if total is not None and self._world_size == 1:
            samples = total
        else:
            samples = self._loader.samples(raw)
        self.seen.append(samples)
        self._recorder.weigh(samples)
        return 1.0 if total is None else samples * self._world_size / total

    def _global_samples(self, batch: int) -> int | None:
        """Real samples of a global batch, where every sample is dealt out exactly once."""
        loader = self._loader
        if loader.num_samples is None or loader.batch_size is None:
            return None
        whole = loader.batch_size * self._world_size
        return min(whole, loader.num_samples - batch * whole)

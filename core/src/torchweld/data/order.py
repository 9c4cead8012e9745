"""Which samples a process reads, in which order: every sample exactly once over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch


def shuffled(num_samples: int, seed: int, epoch: int) -> list[int]:
    """A permutation that depends on ``seed`` and ``epoch`` only; DistributedSampler's own."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(num_samples, generator=generator).tolist()


class Placed(list[int]):
    """Sample indices of a batch that say where in which epoch's order each of them stands.

    It is a list to whoever reads it, so that it goes through a DataLoader to its workers.
    """

    def __init__(self, indices: Sequence[int], seed: int, epoch: int, places: range) -> None:
        super().__init__(indices)
        self.seed, self.epoch, self.places = seed, epoch, places


class ShardedBatches:
    """Batches of sample indices for one process; a batch sampler for a DataLoader.

    The global order is cut into global batches of ``batch_size * world_size`` and dealt out in
    turn, so that every number of processes with the same global batch sees the same batches. The
    last global batch may be uneven; a process that would get none of it is given one sample only
    to stay in step (``real[-1] == 0``), which core weights by 0.

    Args:
        order: ``(seed, epoch) -> indices``.

    Attributes:
        seed: of the order; part of a run's state.
        real: number of real samples of each batch of one epoch, for this process.
    """

    def __init__(
        self,
        num_samples: int,
        order: Callable[[int, int], Sequence[int]],
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ) -> None:
        self._order = order
        self._rank, self._world_size = rank, world_size
        self.seed = seed
        self.batch_size = batch_size
        self._global_batch = batch_size * world_size
        whole, rest = divmod(num_samples, self._global_batch)
        self.real = [batch_size] * whole
        if rest and not drop_last:
            self.real.append(max(0, math.ceil((rest - rank) / world_size)))
        self.num_samples = whole * self._global_batch if drop_last else num_samples
        self._epoch = self._start = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next ``iter`` that epoch's, from that batch on."""
        self._epoch, self._start = epoch, start_batch

    def __len__(self) -> int:
        return len(self.real)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.seed, self._epoch)
        for batch in range(self._start, len(self.real)):
            first = batch * self._global_batch
            chunk = order[first : first + self._global_batch]
            mine = list(chunk[self._rank :: self._world_size]) or [chunk[0]]
            start = first + self._rank
            places = range(start, start + len(mine) * self._world_size, self._world_size)
            yield Placed(mine, self.seed, self._epoch, places)

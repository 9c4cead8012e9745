"""Batches for the inner loops: one epoch after another, from any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from torchweld.errors import RunError

if TYPE_CHECKING:
    from torchweld.interfaces import Loader


class Feed:
    """Reads a loader epoch by epoch; the position belongs to it, not to an iterator.

    Attributes:
        batches: what the inner loops read: transformed batches of the running epoch. Without a
            length it goes on over the end of an epoch, so that no window is cut short.
        transform: applied to each batch; None for nothing.
        epoch: of the next batch.
        batch: how many batches of that epoch were read; where the length is known the run counts.
        counts_samples: whether the samples of each batch are counted, where nothing else knows.
        counted: real samples read since :meth:`take_count`.
    """

    def __init__(
        self,
        loader: Loader,
        transform: Callable[[Any], Any] | None,
        num_batches: int | None,
        *,
        count_samples: bool,
    ) -> None:
        self.loader = loader
        self.num_batches = num_batches
        self.epoch = self.batch = self.counted = 0
        self._started = False
        self.transform = transform
        self.counts_samples = count_samples
        self._raw: Iterator[Any] = iter(())
        self._shown: list[Any] = []
        self.batches: Iterator[Any] = iter(())

    def is_open(self, epoch: int) -> bool:
        """Whether ``epoch`` was begun; without a length one goes over into the next by itself."""
        return self._started and (self.num_batches is None or epoch == self.epoch)

    def start(self, epoch: int, batch: int = 0) -> None:
        """Begin (or, in the middle, take up) an epoch."""
        self._started = True
        self.epoch, self.batch = epoch, batch
        self.loader.set_epoch(epoch, batch)
        raw = iter(self.loader) if self.num_batches is not None else self._endless()
        self._raw = self._counting(raw) if self.counts_samples else raw
        self.batches = self._transformed(self._raw)

    def finish_epoch(self) -> None:
        """Let the loader end its epoch, where all of it was read.

        Its last batch is not its end: a RandomSampler with a generator draws once more after it,
        and without that the next epoch has another order than in a plain loop.
        """
        if self.num_batches == self.loader.num_batches:
            next(self._raw, None)

    def show_first(self) -> Any:
        """Return the next batch as the loader gave it; it is still to be read.

        Raises:
            RunError: there is none.
        """
        first = list(islice(self._raw, 1))
        if not first:
            raise RunError(
                "the training data gave no batch: it is empty, or drop_last left nothing"
            )
        self._raw = chain(first, self._raw)
        self.batches = self._transformed(self._raw)
        return first[0]

    def next_weighed(self, weigh: Callable[[Any], float]) -> tuple[Any, float]:
        """Read one batch together with its weight, which only the loader's own batch tells.

        Raises:
            RunError: the loader gave fewer batches than its length.
        """
        for raw in islice(self._raw, 1):
            weight = weigh(raw)
            return (raw if self.transform is None else self.transform(raw)), weight
        raise self.short_error()

    def short_error(self) -> RunError:
        """The loader gave fewer batches than it said."""
        return RunError(
            f"the loader says it has {self.num_batches} batches an epoch and gave fewer in epoch "
            f"{self.epoch}: its length is wrong"
        )

    def take_count(self) -> int:
        """Samples read since the last call."""
        count, self.counted = self.counted, 0
        return count

    def state(self) -> Mapping[str, object]:
        """What continues the running epoch, beside the position."""
        return self.loader.state_dict()

    def _transformed(self, raw: Iterator[Any]) -> Iterator[Any]:
        return raw if self.transform is None else map(self.transform, raw)

    def _counting(self, raw: Iterator[Any]) -> Iterator[Any]:
        samples = self.loader.samples
        for batch in raw:
            self.counted += samples(batch)
            yield batch

    def _endless(self) -> Iterator[Any]:
        while True:
            before = self.batch
            for batch in self.loader:
                self.batch += 1
                yield batch
            if self.batch == before == 0:
                raise RunError(f"the training data gave no batch in epoch {self.epoch}")
            self.epoch, self.batch = self.epoch + 1, 0
            self.loader.set_epoch(self.epoch)

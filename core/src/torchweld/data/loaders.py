"""Loaders over torch's DataLoader, and over any other iterable of batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from torchweld import rng
from torchweld.data.order import ShardedBatches
from torchweld.errors import CheckpointError
from torchweld.nesting import num_samples


class TorchLoader:
    """A map-style DataLoader, with a position that can be saved and taken up again.

    The order is core's (``batches``: a function of seed and epoch) or the user's own sampler's.
    For the latter, the random state in which the epoch began is part of the position.

    Args:
        counts: samples are counted by what was put into a batch, where that is known, and not by
            the shape of its first tensor: time may come first there, or nodes of graphs.

    Attributes:
        note: what was decided about the user's DataLoader; empty for nothing.
    """

    owns_batches = True
    on_device = False

    def __init__(
        self,
        loader: DataLoader[Any],
        batches: ShardedBatches | None = None,
        *,
        sharded: bool = False,
        counts: bool = False,
        note: str = "",
    ) -> None:
        self._loader, self._batches = loader, batches
        self.note = note
        self.sharded = sharded or batches is not None
        self.batch_size = _batch_size(loader, batches)
        self.num_batches: int | None = len(loader)
        self.num_samples = _num_samples(loader, batches, sharded=sharded)
        self._counts = counts and self.num_samples is not None and self._is_uneven()
        self._epoch = self._start = self._position = 0
        self._epoch_rng: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        self._position = self._start
        if self._batches is None and self._start > 0:
            return self._resumed()
        self._epoch_rng = None if self._batches is not None else _random_state(self._loader)
        batches = iter(self._loader)  # now: it draws from the random state
        return self._count(batches) if self._counts else batches

    def samples(self, batch: Any) -> int:
        """Real samples of ``batch``, the one just yielded."""
        return self._size(self._position - 1) if self._counts else num_samples(batch)

    def _size(self, place: int) -> int:
        """Samples of one batch of an epoch, where their number is known."""
        assert self.batch_size is not None
        assert self.num_samples is not None
        if self._batches is not None:
            return self._batches.real[place]
        return min(self.batch_size, self.num_samples - place * self.batch_size)

    def _is_uneven(self) -> bool:
        last = (self.num_batches or 0) - 1
        return last >= 0 and self._size(last) != self.batch_size

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next ``iter`` that epoch's, from that batch on."""
        self._epoch, self._start = epoch, start_batch
        batches = self._loader.batch_sampler
        parts: list[Any] = [self._loader.dataset]
        if self._batches is not None:
            self._batches.set_epoch(epoch, start_batch)
        else:
            parts += [self._loader.sampler, batches, getattr(batches, "sampler", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def state_dict(self) -> Mapping[str, object]:
        """Who makes the order, and the random state that this epoch's began with."""
        if self._batches is not None:
            return {"order": "core", "seed": self._batches.seed}
        return {
            "order": "sampler",
            "epoch_rng": self._epoch_rng,
            "generators": _generator_states(self._loader),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of an interrupted epoch.

        Raises:
            CheckpointError: the order was made in another way, so the rest of the epoch is unknown.
        """
        _check_order(state, "core" if self._batches is not None else "sampler")
        if self._batches is not None:
            self._batches.seed = state["seed"]
            return
        self._epoch_rng = state["epoch_rng"]
        _set_generators(self._loader, state["generators"])

    def close(self) -> None:
        """Nothing to stop: workers end with their iterator."""

    def _count(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._position += 1
            yield batch

    # ---- the user's own sampler, taken up in the middle of an epoch ---------------------------

    def _resumed(self) -> Iterator[Any]:
        """The rest of the epoch, read without loading what came before.

        The iterator of a DataLoader draws a base seed first and its sampler afterwards, from the
        state in which the epoch began. What is left of the sampler is read when it is needed: it
        may draw at its end, from a generator that the next epoch goes on with.
        """
        if self._epoch_rng is None:
            raise CheckpointError("the position inside the epoch is not in the checkpoint")
        with _as_begun(self._loader, self._epoch_rng):
            torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
            batches = self._loader.batch_sampler
            indices = iter(self._loader.sampler if batches is None else batches)
            _skip(indices, self._start)
            return iter(_over(self._loader, indices))


def _over(loader: DataLoader[Any], indices: Iterator[Any]) -> DataLoader[Any]:
    """The same DataLoader over what is left of its sampler."""
    sampling: dict[str, Any] = {"batch_sampler": indices}
    if loader.batch_sampler is None:
        sampling = {"batch_size": None, "sampler": indices}
    return DataLoader(
        loader.dataset,
        **sampling,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _batch_size(loader: DataLoader[Any], batches: ShardedBatches | None) -> int | None:
    if batches is not None:
        return batches.batch_size
    return loader.batch_size


def _num_samples(
    loader: DataLoader[Any], batches: ShardedBatches | None, *, sharded: bool
) -> int | None:
    """Samples of an epoch where each comes once: core's order, or one process's plain batches."""
    if batches is not None:
        return batches.num_samples
    if sharded or type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        return None
    return len(loader) * loader.batch_size if loader.drop_last else len(loader.sampler)  # type: ignore[arg-type]  # len(loader) worked


class StreamLoader:
    """An iterable of batches that cannot be indexed: its position is the number read so far."""

    owns_batches = True
    on_device = False
    num_samples: int | None = None
    note = ""

    def __init__(
        self, stream: Iterable[Any], *, sharded: bool, batch_size: int | None = None
    ) -> None:
        self._stream = stream
        self.sharded = sharded
        self.batch_size = batch_size
        self.num_batches = _length(stream)
        self._start = 0
        self._epoch_rng: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._start == 0:
            self._epoch_rng = _random_state(self._stream)
            return iter(self._stream)
        if self._epoch_rng is None:
            raise CheckpointError("the position inside the epoch is not in the checkpoint")
        with _as_begun(self._stream, self._epoch_rng):
            iterator = iter(self._stream)
            _skip(iterator, self._start)  # there is no other way to get past what was read
        return iterator

    def samples(self, batch: Any) -> int:
        """Samples of ``batch``."""
        return num_samples(batch)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next ``iter`` that epoch's, reading past ``start_batch`` batches."""
        self._start = start_batch
        parts: list[Any] = [self._stream, getattr(self._stream, "dataset", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def state_dict(self) -> Mapping[str, object]:
        """The random state that this epoch began with."""
        return {
            "order": "stream",
            "epoch_rng": self._epoch_rng,
            "generators": _generator_states(self._stream),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of an interrupted epoch.

        Raises:
            CheckpointError: it was not read as a stream.
        """
        _check_order(state, "stream")
        self._epoch_rng = state["epoch_rng"]
        _set_generators(self._stream, state["generators"])

    def close(self) -> None:
        """Nothing to stop."""


def _length(stream: Any) -> int | None:
    try:
        return len(stream)
    except TypeError:  # no length, or an iterable dataset without one
        return None


# ---- what an order is drawn from -----------------------------------------------------------------


def _check_order(state: Mapping[str, Any], mine: str) -> None:
    if state["order"] != mine:
        raise CheckpointError(
            f"the interrupted epoch was ordered by {state['order']!r} and this run's data is by "
            f"{mine!r} (a DataLoader in one process keeps its own sampler): resume on the "
            "number of processes and with the data that the checkpoint was made with"
        )


def _random_state(data: Any) -> Mapping[str, Any]:
    return {"rng": rng.capture(), "generators": _generator_states(data)}


@contextmanager
def _as_begun(data: Any, state: Mapping[str, Any]) -> Iterator[None]:
    """Be in the state in which an epoch began, except that own generators stay moved on.

    As in the run that was interrupted, they are then where reading so far has left them.
    """
    with rng.preserved():
        rng.restore(state["rng"])
        _set_generators(data, state["generators"])
        yield


def _generators(data: Any) -> dict[str, torch.Generator]:
    """The generators of the user's own: of a DataLoader, its samplers, and theirs."""
    parts = {"": data}
    for path in ("batch_sampler", "sampler", "batch_sampler/sampler", "sampler/sampler"):
        owner, _, name = path.rpartition("/")
        parts[path] = getattr(parts.get(owner), name, None)
    generators = {path: getattr(part, "generator", None) for path, part in parts.items()}
    return {path: g for path, g in generators.items() if isinstance(g, torch.Generator)}


def _generator_states(data: Any) -> dict[str, torch.Tensor]:
    return {path: generator.get_state() for path, generator in _generators(data).items()}


def _set_generators(data: Any, states: Mapping[str, torch.Tensor]) -> None:
    for path, generator in _generators(data).items():
        if path in states:
            generator.set_state(states[path])


def _skip(iterator: Iterator[Any], count: int) -> None:
    deque(islice(iterator, count), maxlen=0)

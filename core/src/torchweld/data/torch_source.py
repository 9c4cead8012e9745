"""Data source ``torch``: a Dataset, a DataLoader, or any iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from torchweld import rng
from torchweld.data.datasets import SeededByPlace, Strided, Transformed, TransformedIterable
from torchweld.data.loaders import StreamLoader, TorchLoader
from torchweld.data.order import ShardedBatches, shuffled
from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from torchweld.interfaces import Loader, LoaderRequest

Order = Callable[[int, int], Sequence[int]]
"""``(seed, epoch) -> indices``"""

_HOW_TO_SHARD = (
    "pass data=use('torch', shard=True) to give each process every world-th sample, or "
    "sharded=True if the data gives each process its own part already"
)


_NOTHING_DROPPED = "drop_last=True is for training; here every sample counts"


class TorchSource:
    """Makes one loader a split; the options are those of ``torchweld.builtin.TorchDataOptions``."""

    def __init__(
        self,
        *,
        batch_size: int | None,
        num_workers: int,
        shuffle: bool | None,
        drop_last: bool,
        pin_memory: bool,
        shard: bool,
        sharded: bool,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InvalidArgument(f"batch_size={batch_size}: a batch has at least one sample")
        if shard and sharded:
            raise InvalidArgument("shard=True and sharded=True contradict each other; keep one")
        if collate_fn is not None and not callable(collate_fn):
            raise InvalidArgument(f"collate_fn={collate_fn!r}: give a function of samples")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.shard, self.sharded = shard, sharded
        self._loading: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "collate_fn": collate_fn,
        }

    def build(self, request: LoaderRequest) -> Loader:
        """Return the loader of one split.

        Raises:
            InvalidArgument: data that cannot be read, is empty, or cannot be shared out.
        """
        data = request.data
        if isinstance(data, DataLoader):
            return self._from_loader(data, request)
        if isinstance(data, IterableDataset):
            return self._from_iterable(data, request)
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return self._from_dataset(data, request)
        if isinstance(data, Iterable):
            return self._from_batches(data, request)
        raise InvalidArgument(
            f"data of type {type(data).__name__} cannot be read: give a Dataset (with "
            "data=use('torch', batch_size=…)), a DataLoader, or an iterable of batches"
        )

    # ---- a Dataset: core makes the order ----------------------------------------------------

    def _from_dataset(self, dataset: Any, request: LoaderRequest) -> Loader:
        size, drop_last = self._size_for(dataset), self.drop_last and request.train
        shuffle = request.train and self.shuffle is not False
        _refuse_empty(dataset)
        if self.sharded and request.env.world_size > 1:
            dataset = _transformed(dataset, request)
            loader = DataLoader(dataset, size, shuffle, drop_last=drop_last, **self._loading)
            return TorchLoader(loader, sharded=True)
        batches = _sharded(
            len(dataset), request, shuffle=shuffle, batch_size=size, drop_last=drop_last
        )
        dataset = _transformed(dataset, request)
        if self._loading["num_workers"] > 0 and request.train:
            dataset = SeededByPlace(dataset)
        loader = DataLoader(dataset, batch_sampler=batches, **self._loading)
        return TorchLoader(loader, batches, counts=_counts(request))

    def _size_for(self, dataset: Any) -> int:
        if self.batch_size is None:
            raise InvalidArgument(
                f"a {type(dataset).__name__} was given without a batch size: choose one with "
                "data=use('torch', batch_size=…), or pass a DataLoader"
            )
        return self.batch_size

    # ---- a DataLoader: the user's own order, shared out only where that is certain -------------

    def _from_loader(self, loader: DataLoader[Any], request: LoaderRequest) -> Loader:
        if isinstance(loader.dataset, IterableDataset):
            return self._from_iterable_loader(loader, request)
        _refuse_empty(loader.dataset)
        loader = _with_transforms(loader, request)
        keeps_all = _drops_last(loader) and not request.train
        if keeps_all:
            loader = _without_dropping(loader)
        if isinstance(loader.sampler, DistributedSampler) and not request.train:
            # Its padding would count samples twice in a metric; its order does not matter there.
            return self._reshard(loader, request, _in_order(loader.dataset))
        if hasattr(_sampler(loader), "num_replicas"):
            return TorchLoader(_checked_replicas(loader, request), sharded=True)
        if request.env.world_size == 1 or self.sharded:
            note = _NOTHING_DROPPED if keeps_all else self._ignored(loader)
            return TorchLoader(loader, sharded=self.sharded, counts=_counts(request), note=note)
        if _is_default(loader):
            order = _order_of(loader) if request.train else _in_order(loader.dataset)
            return self._reshard(loader, request, order)
        if self.shard:
            return self._reshard(loader, request, _order_like(loader))
        raise _unsharded(request, f"a DataLoader with a {type(_sampler(loader)).__name__}")

    def _ignored(self, loader: DataLoader[Any]) -> str:
        """Say that a DataLoader keeps its own, where something else was chosen."""
        if self._loading["collate_fn"] not in {None, loader.collate_fn}:
            return "the DataLoader keeps its own collate_fn"
        if self.batch_size is None or loader.batch_size in {None, self.batch_size}:
            return ""
        return f"the DataLoader keeps its batch_size={loader.batch_size}, not {self.batch_size}"

    def _reshard(self, loader: DataLoader[Any], request: LoaderRequest, order: Order) -> Loader:
        if loader.batch_size is None:
            raise InvalidArgument(
                "a DataLoader with a batch_sampler of its own cannot be shared out over "
                f"{request.env.world_size} processes: {_HOW_TO_SHARD.partition(', or ')[2]}"
            )
        batches = ShardedBatches(
            len(order(request.seed, 0)),
            order,
            seed=request.seed,
            batch_size=loader.batch_size,
            rank=request.env.rank,
            world_size=request.env.world_size,
            drop_last=loader.drop_last and request.train,
        )
        return TorchLoader(
            _clone(loader, batch_sampler=batches),
            batches,
            counts=_counts(request),
            note=_resharded(loader),
        )

    # ---- iterables ---------------------------------------------------------------------------

    def _from_iterable(self, dataset: IterableDataset[Any], request: LoaderRequest) -> Loader:
        loader = DataLoader(
            dataset,
            self._size_for(dataset),
            drop_last=self.drop_last and request.train,
            **self._loading,
        )
        return self._from_iterable_loader(loader, request)

    def _from_iterable_loader(self, loader: DataLoader[Any], request: LoaderRequest) -> Loader:
        env = request.env
        if env.world_size > 1 and self.shard:
            loader = _clone(loader, dataset=Strided(loader.dataset, env.rank, env.world_size))
        elif env.world_size > 1 and not self.sharded:
            raise _unsharded(request, f"an iterable {type(loader.dataset).__name__}")
        if loader.drop_last and not request.train:
            loader = _without_dropping(loader)
        return StreamLoader(
            _with_transforms(loader, request),
            sharded=env.world_size > 1,
            batch_size=loader.batch_size,
        )

    def _from_batches(self, batches: Iterable[Any], request: LoaderRequest) -> Loader:
        """Batches as they come; with ``shard=True`` each process takes every world-th of them."""
        env, name = request.env, type(batches).__name__
        if request.sample_transforms:
            raise InvalidArgument(
                f"a surgery changes single samples, and a {name} gives whole batches: pass a "
                "Dataset or a DataLoader"
            )
        if env.world_size > 1 and self.shard:
            batches = Strided(batches, env.rank, env.world_size)
        elif env.world_size > 1 and not self.sharded:
            raise _unsharded(request, f"a {name}, which is read as it comes,")
        return StreamLoader(batches, sharded=env.world_size > 1)


def _unsharded(request: LoaderRequest, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"{what} would give all {request.env.world_size} processes the same samples, or each a "
        f"part that core cannot know: {_HOW_TO_SHARD}"
    )


def _sharded(
    num_samples: int, request: LoaderRequest, *, shuffle: bool, batch_size: int, drop_last: bool
) -> ShardedBatches:
    in_order = range(num_samples)
    order: Order = lambda _seed, _epoch: in_order  # noqa: E731 - one expression
    return ShardedBatches(
        num_samples,
        partial(shuffled, num_samples) if shuffle else order,
        seed=request.seed,
        batch_size=batch_size,
        rank=request.env.rank,
        world_size=request.env.world_size,
        drop_last=drop_last,
    )


def _counts(request: LoaderRequest) -> bool:
    """Whether somebody asks how many samples a batch has; training alone in a process does not."""
    return request.env.world_size > 1 or not request.train


def _refuse_empty(dataset: Any) -> None:
    if len(dataset) == 0:
        raise InvalidArgument(f"the {type(dataset).__name__} is empty: there is nothing to read")


def _in_order(dataset: Any) -> Order:
    indices = range(len(dataset))
    return lambda _seed, _epoch: indices


def _sampler(loader: DataLoader[Any]) -> Any:
    """What chooses the samples: a batch sampler of the user's own, else what is under it."""
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler
    return batches.sampler if type(batches) is BatchSampler else batches


def _is_default(loader: DataLoader[Any]) -> bool:
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]  # map-style here
    return type(sampler) is SequentialSampler


def _order_of(loader: DataLoader[Any]) -> Order:
    if type(loader.sampler) is RandomSampler:
        return partial(shuffled, len(loader.dataset))  # type: ignore[arg-type]  # map-style here
    return _in_order(loader.dataset)


def _order_like(loader: DataLoader[Any]) -> Order:
    """The user's own sampler, drawn alike on every process."""

    def order(seed: int, epoch: int) -> Sequence[int]:
        with rng.preserved():
            rng.seed_all(seed + epoch)
            return list(loader.sampler)

    return order


def _checked_replicas(loader: DataLoader[Any], request: LoaderRequest) -> DataLoader[Any]:
    sampler, env = _sampler(loader), request.env
    replicas, rank = sampler.num_replicas, getattr(sampler, "rank", env.rank)
    if (replicas, rank) != (env.world_size, env.rank):
        raise InvalidArgument(
            f"the sampler gives part {rank} of num_replicas={replicas}, and this is process "
            f"{env.rank} of {env.world_size}: pass the Dataset, which is shared out by itself, or "
            "make the sampler with this run's numbers"
        )
    return loader


def _resharded(loader: DataLoader[Any]) -> str:
    name = type(loader.sampler).__name__
    return f"the DataLoader's {name} was shared out over the processes, every sample once"


def _transformed(dataset: Any, request: LoaderRequest) -> Any:
    if not request.sample_transforms:
        return dataset
    wrapper = TransformedIterable if isinstance(dataset, IterableDataset) else Transformed
    return wrapper(dataset, tuple(request.sample_transforms))


def _with_transforms(loader: DataLoader[Any], request: LoaderRequest) -> DataLoader[Any]:
    if not request.sample_transforms:
        return loader
    return _clone(loader, dataset=_transformed(loader.dataset, request))


def _without_dropping(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same with its last, smaller batch: evaluation is over all samples."""
    if isinstance(loader.dataset, IterableDataset):
        return _clone(loader, drop_last=False)
    dropping = loader.batch_sampler
    assert isinstance(dropping, BatchSampler)
    batches = BatchSampler(dropping.sampler, dropping.batch_size, drop_last=False)
    return _clone(loader, batch_sampler=batches)


def _drops_last(loader: DataLoader[Any]) -> bool:
    batches = loader.batch_sampler
    return type(batches) is BatchSampler and batches.drop_last


def _clone(
    loader: DataLoader[Any],
    *,
    dataset: Dataset[Any] | None = None,
    batch_sampler: Any = None,
    drop_last: bool | None = None,
) -> DataLoader[Any]:
    """The same DataLoader over another dataset or other batches."""
    iterable = isinstance(loader.dataset, IterableDataset)
    arguments: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    # Not by truth: a dataset or a batch sampler of no length is false, or has no truth at all.
    dataset = loader.dataset if dataset is None else dataset
    batch_sampler = loader.batch_sampler if batch_sampler is None else batch_sampler
    if iterable:
        kept = loader.drop_last if drop_last is None else drop_last
        arguments |= {"batch_size": loader.batch_size, "drop_last": kept}
    elif batch_sampler is None:
        arguments |= {"batch_size": None, "sampler": loader.sampler}
    else:
        arguments["batch_sampler"] = batch_sampler
    return DataLoader(dataset, **arguments)

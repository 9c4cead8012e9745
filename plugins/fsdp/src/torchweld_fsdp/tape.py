"""A record of operations on tensors without values, of which any part can be done for real later.

A tensor is known by its storage and its place in it, because ``.data``, views and parameters are
other objects over the same storage.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Storages = dict[int, torch.UntypedStorage]


@dataclass(frozen=True)
class View:
    """Where the values of a tensor are: a storage, by its identity, and the place in it."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugated: bool
    negated: bool

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """The same view of a storage with values."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor = empty.set_(storage, self.offset, self.size, self.stride)
        tensor = tensor.conj() if self.conjugated else tensor
        return torch._neg_view(tensor) if self.negated else tensor


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        func: of ``torch.ops``.
        args: positional arguments, a :class:`View` in place of each tensor without values.
        kwargs: named arguments, likewise.
        reads: storages whose values before it matter.
        writes: storages that it makes or changes.
        outputs: the tensors it returns.
        generator: that it draws from, if it does.
        state: of ``generator`` before it.
    """

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    outputs: tuple[View, ...]
    generator: torch.Generator | None = None
    state: Tensor | None = None


class Tape:
    """Operations in the order in which a constructor asked for them."""

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._writers: defaultdict[int, list[int]] = defaultdict(list)
        # Keeps the storages alive, so that no identity is given twice; they have no bytes.
        self._storages: Storages = {}

    def view(self, tensor: Tensor) -> View:
        """Describe ``tensor``, which has no values."""
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage._cdata, storage)
        return _view(tensor)

    def knows(self, tensor: Tensor) -> bool:
        """Whether the storage of ``tensor`` was seen while recording."""
        return tensor.untyped_storage()._cdata in self._storages

    def append(self, op: Op) -> None:
        """Record ``op``; one that draws is done at once, to leave its generator as it would be."""
        for storage in op.writes:
            self._writers[storage].append(len(self._ops))
        self._ops.append(op)
        if op.generator is not None:
            latest = len(self._ops) - 1
            self._replay([*self._history(op.reads, latest), latest], keep=frozenset())

    def value(self, tensor: Tensor) -> Tensor:
        """Compute what ``tensor`` would hold now; no generator is moved."""
        view = _view(tensor)
        history = self._history([view.storage], len(self._ops))
        with _kept_generators(self._ops[index] for index in history):
            storages = self._replay(history, keep=frozenset([view.storage]))
        found = view.of(self._storage(view.storage, storages))
        whole = found.untyped_storage().nbytes() == found.numel() * found.element_size()
        return found if whole else found.clone()

    def _history(self, storages: Iterable[int], before: int) -> list[int]:
        """The operations that decide what is in ``storages`` before operation ``before``."""
        found: set[int] = set()
        wanted = [(storage, before) for storage in storages]
        while wanted:
            storage, before = wanted.pop()
            writers = self._writers[storage]
            place = bisect_left(writers, before)
            if place and writers[place - 1] not in found:
                latest = writers[place - 1]
                found.add(latest)  # what it reads leads to the writers before it
                wanted += [(read, latest) for read in self._ops[latest].reads]
        return sorted(found)

    def _replay(self, indices: Sequence[int], keep: frozenset[int]) -> Storages:
        """Do the operations on the CPU; storages go after their last use, but for ``keep``."""
        ops = [self._ops[index] for index in indices]
        last = {storage: op for op in ops for storage in op.reads | op.writes}
        storages: Storages = {}
        for op in ops:
            self._perform(op, storages)
            for storage in (op.reads | op.writes) - keep:
                if last[storage] is op:
                    del storages[storage]
        return storages

    @torch.no_grad()
    def _perform(self, op: Op, storages: Storages) -> None:
        if op.generator is not None and op.state is not None:
            op.generator.set_state(op.state)
        args, kwargs = tree_map(partial(self._real, storages), (op.args, op.kwargs))
        made = [leaf for leaf in tree_leaves(op.func(*args, **kwargs)) if isinstance(leaf, Tensor)]
        for view, tensor in zip(op.outputs, made, strict=True):
            if view.storage not in storages:
                storages[view.storage] = _laid_out_as(view, tensor).untyped_storage()

    def _real(self, storages: Storages, leaf: object) -> object:
        """What takes the place of ``leaf`` where there are values."""
        if isinstance(leaf, View):
            return leaf.of(self._storage(leaf.storage, storages))
        if isinstance(leaf, torch.device) and leaf.type == "meta":
            return torch.device("cpu")
        return leaf

    def _storage(self, identity: int, storages: Storages) -> torch.UntypedStorage:
        """The storage with values; a new one where nothing was written or all is overwritten."""
        if identity not in storages:
            num_bytes = self._storages[identity].nbytes()
            storages[identity] = torch.UntypedStorage(num_bytes, device="cpu")
        return storages[identity]


def _view(tensor: Tensor) -> View:
    return View(
        tensor.untyped_storage()._cdata,
        tensor.dtype,
        tuple(tensor.size()),
        tensor.stride(),
        int(tensor.storage_offset()),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _laid_out_as(view: View, tensor: Tensor) -> Tensor:
    """``tensor`` in the layout that was recorded; the CPU may have chosen another."""
    if tensor.stride() == view.stride and tensor.storage_offset() == view.offset:
        return tensor
    empty = torch.empty_strided(view.size, view.stride, dtype=view.dtype, device="cpu")
    return empty.copy_(tensor)


@contextmanager
def _kept_generators(ops: Iterable[Op]) -> Iterator[None]:
    generators = {op.generator for op in ops if op.generator is not None}
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)

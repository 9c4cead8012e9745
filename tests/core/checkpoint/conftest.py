"""Several ranks in one process: a thread each, and a barrier that carries their texts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from torchweld.checkpoint import Exchange, write
from torchweld.interfaces import Shard

Save = Callable[..., list[Path]]


class SharedTexts:
    """What a store is to real ranks; a rank that never comes breaks it after ten seconds."""

    def __init__(self, world_size: int) -> None:
        self._texts = [""] * world_size
        self._barrier = threading.Barrier(world_size, timeout=120)

    def of(self, rank: int) -> Exchange:
        return partial(self._exchange, rank)

    def _exchange(self, rank: int, label: str, text: str) -> list[str]:
        self._texts[rank] = text
        self._barrier.wait()
        texts = list(self._texts)
        self._barrier.wait()
        return texts


def _save(path: Path, shards: Sequence[Sequence[Shard]], **same: Any) -> list[Path]:
    """Write with as many ranks as ``shards`` has entries; raise what rank 0 raised."""
    outcomes = _outcomes(path, shards, **same)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Path)]


def _outcomes(
    path: Path, shards: Sequence[Sequence[Shard]], **same: Any
) -> list[Path | BaseException]:
    shared = SharedTexts(len(shards))

    def one(rank: int) -> Path | BaseException:
        mine = {key: value[rank] for key, value in same.items() if key in ("tensors", "state")}
        others = {key: value for key, value in same.items() if key not in mine}
        try:
            return write(
                path,
                rank=rank,
                world_size=len(shards),
                exchange=shared.of(rank),
                shards=shards[rank],
                **{"header": {}, **others, **mine},
            )
        except BaseException as error:  # noqa: BLE001 - every rank's outcome is looked at
            return error

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(one, range(len(shards))))


@pytest.fixture
def save() -> Save:
    """Write a checkpoint with several ranks."""
    return _save


@pytest.fixture
def outcomes() -> Callable[..., list[Path | BaseException]]:
    """Write a checkpoint with several ranks and return what each returned or raised."""
    return _outcomes

"""Random numbers in workers: the same for any number of workers and ranks, and on resuming."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from torchweld import rng
from torchweld.data.torch_source import TorchSource
from torchweld.interfaces import Env, Loader, LoaderRequest


class Noise(Dataset[Any]):
    """Each sample is its index and one random number of python, numpy and torch each."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def loader_of(
    workers: int, *, batch: int = 4, rank: int = 0, world: int = 1, seed: int = 5
) -> Loader:
    source = TorchSource(
        batch_size=batch, num_workers=workers, shuffle=None, drop_last=False, pin_memory=False,
        shard=False, sharded=False,
    )  # fmt: skip
    env = Env(rank=rank, world_size=world, local_rank=rank, device=torch.device("cpu"))
    return source.build(LoaderRequest(Noise(), train=True, env=env, seed=seed))


def rows(loader: Loader, epoch: int = 0, start: int = 0) -> dict[int, tuple[float, ...]]:
    """By index, what was drawn for it."""
    loader.set_epoch(epoch, start)
    return {
        int(index): tuple(map(float, drawn))
        for batch in loader
        for index, *drawn in zip(*batch, strict=True)
    }


def test_samples_are_the_same_for_any_workers_batches_and_ranks() -> None:
    one = rows(loader_of(1))

    assert rows(loader_of(2)) == one
    assert (
        rows(loader_of(1, batch=2, rank=0, world=2)) | rows(loader_of(2, batch=2, rank=1, world=2))
        == one
    )
    assert len({number for drawn in one.values() for number in drawn}) == 3 * 22


def test_an_epoch_taken_up_in_its_middle_has_the_same_samples() -> None:
    whole = rows(loader_of(2), epoch=1)

    rest = rows(loader_of(1), epoch=1, start=3)

    assert len(rest) == 22 - 12
    assert {index: whole[index] for index in rest} == rest


@pytest.mark.parametrize("changed", [{"epoch": 1}, {"seed": 6}])
def test_another_epoch_or_seed_has_other_random_numbers(changed: dict[str, int]) -> None:
    epoch = changed.pop("epoch", 0)

    one, other = rows(loader_of(1)), rows(loader_of(1, **changed), epoch)

    assert all(one[index] != other[index] for index in one)


def test_without_the_remedy_another_number_of_workers_draws_others() -> None:
    drawn = []
    for workers in (1, 2):
        torch.manual_seed(0)
        batches = DataLoader(Noise(), 4, num_workers=workers)
        drawn.append([float(number) for batch in batches for number in batch[3]])

    assert drawn[0] != drawn[1]


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_sample_is_seeded_as_a_run_is_and_without_its_call_stack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker took 0.16 ms a sample for the call stack, and more the deeper it was."""
    stacks: list[Any] = []

    def format_stack(*_: Any, **__: Any) -> list[str]:
        stacks.append(1)
        return []

    monkeypatch.setattr("traceback.format_stack", format_stack)
    rng.seed_all(7)
    expected = drawn()
    by_torch = len(stacks)

    rng.seed_sample(7)

    assert drawn() == expected
    assert len(stacks) == by_torch

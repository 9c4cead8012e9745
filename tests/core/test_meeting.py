"""Ranks meet those of their own attempt in a store that has seen others."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from torchweld.errors import RankMissing
from torchweld.processes.meeting import meet


def store() -> dist.Store:
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=60))
    return made


def meet_all(place: dist.Store, *ranks: int, first: int = 0) -> dict[int, str]:
    """What each of three ranks finds; ``first`` comes before the others."""
    found: dict[int, str] = {}

    def work(rank: int) -> None:
        found[rank] = meet(place, rank, 3, 60.0)

    order = sorted(ranks, key=lambda rank: rank != first)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("first", [0, 2])
def test_every_attempt_meets_under_a_word_of_its_own(first: int) -> None:
    place = store()

    attempts = [meet_all(place, 0, 1, 2, first=first) for _ in range(3)]

    assert [len(set(attempt.values())) for attempt in attempts] == [1, 1, 1]
    assert len({attempt[0] for attempt in attempts}) == 3


@pytest.mark.parametrize(
    ("ranks", "missing"),
    [([0, 1], "rank 2 of 3"), ([0], "rank 1, 2 of 3"), ([1, 2], "rank 0 of 3")],
)
def test_who_does_not_come_is_named_even_if_he_came_before(ranks: list[int], missing: str) -> None:
    place = store()
    meet_all(place, 0, 1, 2)
    told: list[str] = []

    def work(rank: int) -> None:
        with pytest.raises(RankMissing) as raised:
            meet(place, rank, 3, 0.5)
        told.append(str(raised.value))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(told) == len(ranks)
    assert all(text.startswith(f"{missing} did not arrive at 'the launch'") for text in told)

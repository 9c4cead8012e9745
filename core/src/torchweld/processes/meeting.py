"""Where the processes of one attempt meet in a store that outlives them.

torchrun's store stays while workers are started again, with all that the attempt before wrote. Its
number of the attempt does not tell them apart: every machine counts its own, one whose workers were
healthy counts nothing, and the next attempt is "1" here and "0" there (torch 2.7).
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from torchweld.processes.channel import missing

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_SECONDS = 0.005
_CALL = "meeting"


def meet(store: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Return a word that the ranks of this attempt share, and no other attempt has.

    Rank 0 calls with a new word, the others answer with new words of their own, and rank 0 repeats
    all it has heard. Who finds itself there has met this rank 0, not what an earlier one left.

    Raises:
        RankMissing: a rank did not come in time.
    """
    place = _Meeting(store, world_size, time.monotonic() + timeout_seconds, timeout_seconds)
    return place.call() if rank == 0 else place.answer(rank)


class _Meeting:
    def __init__(
        self, store: Store, world_size: int, deadline: float, timeout_seconds: float
    ) -> None:
        self._store: Any = store  # torch's hints leave out check()
        self._others = range(1, world_size)
        self._deadline, self._timeout_seconds = deadline, timeout_seconds

    def call(self) -> str:
        """Rank 0's part."""
        word = uuid.uuid4().hex
        self._store.set(_CALL, word)
        keys = [_answer_key(word, rank) for rank in self._others]
        while not self._store.check(keys):
            self._wait(word)
        self._store.set(_heard_key(word), " ".join(self._get(key) for key in keys))
        return word

    def answer(self, rank: int) -> str:
        """Every other rank's."""
        mine, answered = uuid.uuid4().hex, ""
        while True:
            word = self._get(_CALL) if self._store.check([_CALL]) else ""
            if word != answered:
                self._store.set(_answer_key(word, rank), mine)
                answered = word
            heard = _heard_key(answered)
            if answered and self._store.check([heard]) and mine in self._get(heard).split():
                return answered
            self._wait(answered)

    def _wait(self, word: str) -> None:
        if time.monotonic() > self._deadline:
            world_size = len(self._others) + 1
            raise missing(self._late(word), world_size, "the launch", self._timeout_seconds)
        time.sleep(_POLL_SECONDS)

    def _late(self, word: str) -> list[int]:
        if not word:
            return [0]
        late = [r for r in self._others if not self._store.check([_answer_key(word, r)])]
        return late or [0]

    def _get(self, key: str) -> str:
        return bytes(self._store.get(key)).decode()


def _answer_key(word: str, rank: int) -> str:
    return f"{_CALL}/{word}/{rank}"


def _heard_key(word: str) -> str:
    return f"{_CALL}/{word}/heard"

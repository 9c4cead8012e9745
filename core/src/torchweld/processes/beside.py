"""Agreement between threads that work beside the training, one in each process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torchweld.errors import RankFailed, RankMissing

if TYPE_CHECKING:
    from torch.distributed import Store

    from torchweld.processes.watching import Watch

_POLL_SECONDS = 0.02  # nobody waits for these threads: four times as seldom as the main ones ask


class BesideExchange:
    """Exchanges texts with the same thread of all other ranks, for one piece of work.

    A collective would be in the way of the training's: two threads come to a process group in
    another order on every rank, and gloo ends the process. Here a thread only asks the store what
    is there and never waits in it, so it may share a connection with whoever does the same.
    """

    def __init__(
        self,
        store: Store | None,
        *,
        rank: int,
        world_size: int,
        prefix: str,
        watch: Watch | None,
        timeout_seconds: float,
    ) -> None:
        """Make one.

        Args:
            store: None for a single rank; over a connection in which nobody waits.
            prefix: of the keys: the same on all ranks, and never used before.
            watch: knows whether another rank has stopped.
            timeout_seconds: how long a rank may be late.
        """
        self._store: Any = store  # torch's hints leave out check()
        self._rank, self._world_size = rank, world_size
        self._prefix, self._watch = prefix, watch
        self._timeout_seconds = timeout_seconds
        self._hurried_at = 0.0

    def __call__(self, label: str, text: str) -> list[str]:
        """Give ``text`` to all ranks and return everybody's, in rank order; once a label.

        Raises:
            RankMissing: a rank did not come here in time.
            RankFailed: another rank stopped meanwhile.
        """
        if self._world_size == 1:
            return [text]
        keys = [f"{self._prefix}/{label}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], text)
        began = time.monotonic()
        while not self._store.check(keys):
            if self._watch is not None and self._watch.cause is not None:
                raise RankFailed(self._watch.cause)
            if time.monotonic() - max(began, self._hurried_at) > self._timeout_seconds:
                raise self._missing(keys, label)
            time.sleep(_POLL_SECONDS)
        return [bytes(self._store.get(key)).decode() for key in keys]

    def hurry(self, seconds: float) -> None:
        """Wait only so long from now on, once this rank's own part is done; from any thread."""
        self._hurried_at, self._timeout_seconds = time.monotonic(), seconds

    def _missing(self, keys: list[str], label: str) -> RankMissing:
        late = [str(r) for r, key in enumerate(keys) if not self._store.check([key])]
        return RankMissing(
            f"rank {', '.join(late)} of {self._world_size} did not come to {label!r} within "
            f"{self._timeout_seconds:g} s: look for its own error (TORCHWELD_TIMEOUT_SECONDS sets "
            "the time)"
        )

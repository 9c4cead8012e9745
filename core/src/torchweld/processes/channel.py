"""What the processes of a run say to each other, through the launch's key-value store.

It works before there is a process group, and with any back end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from torchweld.errors import (
    PluginError,
    Preempted,
    RankFailed,
    RankMissing,
    RunError,
    TorchweldError,
)
from torchweld.processes.beside import BesideExchange
from torchweld.processes.watching import Watch, asked_key, here_key, left_key, process_mark
from torchweld.processes.whereabouts import raised_at

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_SECONDS = 0.005
_CAUSE_SECONDS = 3.0  # how long to ask why contact was lost
_ANSWER_SECONDS = 3.0  # how long to ask where the others are
_LAST_READ_SECONDS = 10.0  # how long the host of the store waits for the others' last look


class Channel:
    """One process's end of the channel between all ranks; with one rank it answers by itself.

    Attributes:
        group: the process group that was made over this channel, if any.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        store: Store | None = None,
        watch_store: Store | None = None,
        host: int | None = None,
        timeout_seconds: float = 300.0,
    ) -> None:
        """Make one.

        Args:
            store: None for a single rank.
            watch_store: the same over a connection of its own, since a store answers one call at
                a time, and making a process group may wait in it.
            host: the rank with whose process the store ends; None for another process.
            timeout_seconds: how long a rank may be late.
        """
        self.rank, self.world_size = rank, world_size
        self.group: Any = None
        self.timeout_seconds = timeout_seconds
        self._store: Any = store
        self._unwaited_store = watch_store or store
        self._hosts_store = rank == host
        self._num_failures = self._num_exchanges = self._num_works = 0
        self._reported: BaseException | None = None
        self._watch: Watch | None = None
        if store is not None and world_size > 1:
            store.set(f"process/{rank}", process_mark())
            self._watch = Watch(
                watch_store or store,
                rank=rank,
                world_size=world_size,
                host=host,
                timeout_seconds=timeout_seconds,
            )

    # ---- agreement -----------------------------------------------------------------------------

    def exchange(self, label: str, text: str) -> list[str]:
        """Give ``text`` to all ranks and return everybody's, in rank order; also a barrier.

        Raises:
            RankMissing: a rank did not come here in time; names it and ``label``.
            RankFailed: another rank stopped meanwhile.
        """
        if self.world_size == 1:
            return [text]
        prefix = self.next_key("exchange")
        keys = [f"{prefix}/{rank}" for rank in range(self.world_size)]
        self._store.set(keys[self.rank], f"{label}\n{text}")
        self._wait_for(keys, label)
        answers = [bytes(self._store.get(key)).decode() for key in keys]
        self._check_same_place(label, [answer.partition("\n")[0] for answer in answers])
        return [answer.partition("\n")[2] for answer in answers]

    def next_key(self, kind: str) -> str:
        """A key that is the same on all ranks and was not used before.

        After a failure, of which every rank knows, counting begins anew: the ranks stopped at
        different places.
        """
        self._num_exchanges += 1
        return f"{kind}/{self._num_failures}/{self._num_exchanges}"

    def beside(self, kind: str) -> BesideExchange:
        """Return an exchange for a thread beside the main one; all ranks call this alike."""
        return BesideExchange(
            self._unwaited_store,
            rank=self.rank,
            world_size=self.world_size,
            prefix=self.next_key(kind),
            watch=self._watch,
            timeout_seconds=self.timeout_seconds,
        )

    def _check_same_place(self, label: str, labels: list[str]) -> None:
        for rank, other in enumerate(labels):
            if other != label:
                raise RunError(
                    f"rank {self.rank} is at {label!r} while rank {rank} is at {other!r}: every "
                    "process must make the same calls of torchweld in the same order"
                )

    def _wait_for(self, keys: list[str], label: str) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        while not self._store.check(keys):
            if self._watch is not None and self._watch.cause is not None:
                raise self._failed(self._watch.cause)
            if time.monotonic() > deadline:
                late = [r for r, key in enumerate(keys) if not self._store.check([key])]
                raise missing(late, self.world_size, label, self.timeout_seconds)
            time.sleep(_POLL_SECONDS)

    # ---- failure -------------------------------------------------------------------------------

    @contextmanager
    def first_cause(self, where: Mapping[str, Any]) -> Iterator[None]:
        """Around the work of a run: an error here is told to the others, theirs are told here.

        Args:
            where: read when something fails: ``{"doing": "step 118", "note": "…"}``.
        """
        if self._watch is None:
            yield
            return
        number = self._begin(self._watch, where)
        try:
            # One rank that fits and one that evaluates would wait for each other in collectives.
            self.exchange(f"the start of {where['doing']}", "")
            yield
        except GeneratorExit:  # a run that was never closed is no failure
            self._end(self._watch, number)
            raise
        except Preempted:  # agreed on by all ranks, each of which raises its own
            self._end(self._watch, number)
            self._wait_for_readers(number)
            raise
        except BaseException as error:
            cause = self._cause_of(error, where)
            self._end(self._watch, number)
            if cause is not None:
                raise cause from error
            raise
        self._end(self._watch, number)
        self._wait_for_readers(number)

    def _begin(self, watch: Watch, where: Mapping[str, Any]) -> int:
        self._num_works += 1
        watch.open.append(self._num_works)
        if len(watch.open) == 1:
            watch.where, watch.failure_key = where, f"failure/{self._num_failures}"
            watch.start()
        return self._num_works

    def _end(self, watch: Watch, number: int) -> None:
        watch.open.remove(number)
        if not watch.open:
            watch.stop()
        with suppress(RuntimeError):  # the store is gone with its host: nobody waits for this
            self._store.set(left_key(number, self.rank), "done")

    def _cause_of(self, error: BaseException, where: Mapping[str, Any]) -> RankFailed | None:
        """Tell the others of ``error``; returns what to raise instead, if another was first."""
        watch = self._watch
        assert watch is not None
        if error is self._reported:
            return None
        first: RankFailed | None = None
        if _is_lost_contact(error) and watch.wait_for_cause(_CAUSE_SECONDS) is not None:
            first = self._failed(str(watch.cause))
        elif _is_time_out(error):
            watch.cause = self._waited_in_vain(error, where)
            first = self._failed(watch.cause)
        if first is not None or isinstance(error, RankFailed):
            self._tell(watch.cause or str(error))
        else:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            # torchweld's own say what is wrong by themselves.
            place = "" if isinstance(error, TorchweldError) else raised_at(error)
            self._tell(f"rank {self.rank} stopped in {where['doing']}: {what}{place}")
        self._reported = first or error
        return first

    def _waited_in_vain(self, error: BaseException, where: Mapping[str, Any]) -> str:
        """Ask every rank where it is; all but one may wait like this one."""
        key = f"failure/{self._num_failures}"
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        lines = [f"rank {self.rank} waited in vain for the others in {where['doing']}: {error}"]
        with suppress(RuntimeError):  # the store is gone with its host
            self._store.set(asked_key(key), "")
            deadline = time.monotonic() + _ANSWER_SECONDS
            keys = {rank: here_key(key, rank) for rank in others}
            while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            for rank, answer in keys.items():
                known = self._store.check([answer])
                place = bytes(self._store.get(answer)).decode() if known else "no answer"
                lines.append(f"  rank {rank} is at: {place}")
        return "\n".join(lines)

    def _tell(self, cause: str) -> None:
        """Say why this rank stops, unless another was first."""
        key = f"failure/{self._num_failures}"
        number = self._watch.open[-1] if self._watch is not None else 0
        self._num_failures += 1
        self._num_exchanges = 0
        if self._watch is not None:
            self._watch.failure_key = f"failure/{self._num_failures}"
        with suppress(RuntimeError):  # the store is gone with its host: nobody is left to tell
            if self._store.add(f"{key}/count", 1) == 1:
                self._store.set(key, cause)
            self._store.set(left_key(number, self.rank), "failed")
            self._wait_for_readers(number)

    def _wait_for_readers(self, number: int) -> None:
        """Let the others read before the process that hosts the store goes."""
        if not self._hosts_store or self._watch is None:
            return
        deadline = time.monotonic() + _LAST_READ_SECONDS
        waiting = [rank for rank in range(self.world_size) if rank != self.rank]
        while waiting and time.monotonic() < deadline:
            waiting = [
                rank
                for rank in waiting
                if not self._store.check([left_key(number, rank)]) and self._watch.listens(rank)
            ]
            time.sleep(_POLL_SECONDS)

    def _failed(self, cause: str) -> RankFailed:
        assert self._watch is not None
        note = self._watch.where.get("note")
        return RankFailed(f"{cause}\n{note}" if note else cause)


def missing(late: list[int], world_size: int, label: str, seconds: float) -> RankMissing:
    """The error for ranks that did not come to ``label`` in time."""
    return RankMissing(
        f"rank {', '.join(map(str, late))} of {world_size} did not arrive at {label!r} within "
        f"{seconds:g} s: look for its own error above, or start all processes "
        "(TORCHWELD_TIMEOUT_SECONDS sets the time)"
    )


def _is_time_out(error: BaseException) -> bool:
    """Whether a collective was given up; torch has no class for that."""
    if isinstance(error, PluginError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)


def _is_lost_contact(error: BaseException) -> bool:
    """Whether ``error`` says that another process is not there any more, and not why."""
    if isinstance(error, PluginError) and error.__cause__ is not None:
        error = error.__cause__  # a strategy was talking to it
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    words = ("gloo", "nccl", "closed by peer", "reset by peer", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in text for word in words)

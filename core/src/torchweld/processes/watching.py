"""Hears that another rank has stopped while this one works, and who is gone without a word.

The main thread may be deep in a collective, where it can neither ask nor be interrupted: gloo waits
for half an hour, NCCL does not notice at all. So a thread beside it asks four times a second.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchweld.processes.whereabouts import whereabouts

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_SECONDS = 0.25
_GRACE_SECONDS = 10.0  # a process with workers and much memory needs a while to end


def process_mark() -> str:
    """Where this process is and since when; empty where the system does not say.

    The start time is there because numbers of processes are used again; the name space, because
    two containers of one machine have the same numbers.
    """
    started = _started(os.getpid())
    if started is None:
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getpid()} {started}"


def has_ended(mark: str, mine: str) -> bool:
    """Whether the process of ``mark`` is certainly no more; False where that cannot be seen."""
    if not mark or mark.split()[:2] != mine.split()[:2]:
        return False
    *_, number, started = mark.split()
    return _started(int(number)) != started


def _started(number: int) -> str | None:
    """When a process began, in ticks; None if there is none, or one that has ended."""
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in parentheses, may contain anything.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in {"Z", "X"} else fields[18]


class Watch:
    """Asks whether another rank has stopped, from when the work begins until it ends.

    Attributes:
        failure_key: where a rank that stops says why.
        open: numbers of the pieces of work that this rank is in.
        cause: why another rank stopped, None while none did.
    """

    def __init__(
        self, store: Store, *, rank: int, world_size: int, host: int | None, timeout_seconds: float
    ) -> None:
        self.failure_key = ""
        self.open: list[int] = []
        self.cause: str | None = None
        self.where: Mapping[str, Any] = {}
        self._store: Any = store  # torch's hints leave out check()
        self._rank, self._peers = rank, [r for r in range(world_size) if r != rank]
        self._host = host
        self._grace_seconds = min(_GRACE_SECONDS, timeout_seconds)
        self._mine = process_mark()
        self._marks: dict[int, str] = {}
        self._host_left = False
        self._answered = ""
        self._thread: threading.Thread | None = None
        self._heard, self._stopped = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin to ask."""
        self.cause = None
        self._heard, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._heard, self._stopped), name="torchweld-watch", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the asking."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def wait_for_cause(self, seconds: float) -> str | None:
        """Return why another rank stopped, once that is known; None if it is not in time."""
        self._heard.wait(seconds)
        return self.cause

    def listens(self, rank: int) -> bool:
        """Whether ``rank`` has arrived and has not ended."""
        return not self._ended(rank) and rank in self._marks

    def _ended(self, rank: int) -> bool:
        if rank not in self._marks and self._store.check([f"process/{rank}"]):
            self._marks[rank] = bytes(self._store.get(f"process/{rank}")).decode()
        return has_ended(self._marks.get(rank, ""), self._mine)

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self, heard: threading.Event, stopped: threading.Event) -> None:
        while not stopped.wait(_POLL_SECONDS):
            cause = self._look()
            if cause is None:
                continue
            self.cause = cause
            heard.set()
            self._leave()
            if not stopped.wait(self._grace_seconds):
                self._end_process(cause)
            return

    def _look(self) -> str | None:
        try:
            if self._store.check([self.failure_key]):
                return bytes(self._store.get(self.failure_key)).decode()
            self._answer()
            if self._host is not None and self._host != self._rank:
                self._host_left = self._host_left or self._has_left(self._host)
            gone = [rank for rank in self._peers if self._ended(rank) and not self._has_left(rank)]
            # A rank may have said why it stops between the two questions.
            if gone and self._store.check([self.failure_key]):
                return bytes(self._store.get(self.failure_key)).decode()
        except RuntimeError:  # the store is closed with the process that hosts it
            return None if self._host_left else self._host_is_gone()
        return _gone(gone[0]) if gone else None

    def _answer(self) -> None:
        """Say where this process is, once, if another asks because it waits in vain."""
        key = self.failure_key
        if key != self._answered and self._store.check([asked_key(key)]):
            self._answered = key
            self._store.set(here_key(key, self._rank), whereabouts(self.where))

    def _has_left(self, rank: int) -> bool:
        keys = [left_key(number, rank) for number in tuple(self.open)]
        return bool(keys) and bool(self._store.check(keys))

    def _host_is_gone(self) -> str:
        if self._host is not None:
            return _gone(self._host)
        return "the process that started the others, and that all talk through, is gone"

    def _leave(self) -> None:
        try:
            for number in tuple(self.open):
                self._store.set(left_key(number, self._rank), "heard")
        except RuntimeError:
            pass  # nobody is left to be told

    def _end_process(self, cause: str) -> None:
        """End where the main thread is stuck in a collective that can never be completed."""
        lines = [f"torchweld: {cause}", *filter(None, [self.where.get("note")])]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        os._exit(1)


def asked_key(failure_key: str) -> str:
    """Set by a rank that waits in vain and wants to know where the others are."""
    return f"{failure_key}/asked"


def here_key(failure_key: str, rank: int) -> str:
    """Where ``rank`` is, once it was asked."""
    return f"{failure_key}/here/{rank}"


def left_key(number: int, rank: int) -> str:
    """Set once ``rank`` needs nobody any more for a piece of work."""
    return f"left/{number}/{rank}"


def _gone(rank: int) -> str:
    return (
        f"rank {rank} is gone: its process ended without a word, as after kill -9, a crash or for "
        "lack of memory"
    )

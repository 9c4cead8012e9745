"""A place for all that a run writes, which is gone afterwards, also after a kill.

Betons, checkpoints and logs of a benchmark take hundreds of MB, and processes that are ended leave
behind what they had in the temporary directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_PREFIX, _LOCK = "weld-", "lock"  # short: sockets lie in there, whose paths have 104 bytes at most


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a directory, the temporary one of this process and of those that it starts.

    What an earlier run has left that was killed is removed: nobody holds its lock any more.
    """
    before = os.environ.get("TMPDIR")
    root = Path(tempfile.gettempdir())
    _remove_left(root)
    place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    lock = os.open(place / "unlocked", os.O_CREAT | os.O_WRONLY, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (place / "unlocked").rename(place / _LOCK)  # only now may others try it
    os.environ["TMPDIR"] = tempfile.tempdir = str(place)
    owner = os.getpid()
    try:
        yield place
    finally:
        # A forked process that drops its copy of this generator comes here too: on Python 3.13 each
        # that multiprocessing starts, as it forgets what its parent has registered for its exit.
        if os.getpid() == owner:
            _leave(place, before)
            os.close(lock)


def _leave(place: Path, before: str | None) -> None:
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before
    shutil.rmtree(place, ignore_errors=True)


@contextmanager
def terminable() -> Iterator[None]:
    """Leave by way of every ``finally`` when this process is asked to end, by ``timeout`` say."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove_left(root: Path) -> None:
    for lock in root.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock.open("w") as file:  # another user's, or held, or just removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)

"""The file that is being written: beside its place, without a name, and named when it is whole.

Where the system knows no files without a name, it has another one meanwhile, and is removed by
whichever process is the last to see the conversion end.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torchweld.guard import one_line
from torchweld_ffcv.errors import ConversionError
from torchweld_ffcv.pages import sync


@dataclass(frozen=True)
class OpenFile:
    """A file that nobody else knows yet.

    Attributes:
        path: the name that it has meanwhile, or for a moment at the end.
        fd: open for reading and writing, and locked as long as a process of ours has it.
        place: where it belongs.
        has_name: whether ``path`` exists already.
    """

    path: Path
    fd: int
    place: Path
    has_name: bool

    def publish(self) -> None:
        """Put it in its place in one step, over an older file; the data is on disk first.

        Raises:
            WriteFailed: the data is not on disk.
            ConversionError: the name cannot be had.
        """
        sync(self.fd)
        try:
            if not self.has_name:
                _give_name(self.fd, self.path)
            self.path.replace(self.place)
        except OSError as error:
            raise ConversionError(f"{self.place} cannot be written: {one_line(error)}") from error
        directory = os.open(self.place.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems know no such thing
                os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def new_file(place: Path) -> Iterator[OpenFile]:
    """An unfinished file for ``place``; it is gone afterwards unless it was published.

    What earlier conversions left there is removed.

    Raises:
        ConversionError: no file can be written there.
    """
    _remove_abandoned(place)
    path = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    fd, has_name = _opened(path, place)
    try:
        with suppress(OSError):  # without locks nobody takes it for abandoned either
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield OpenFile(path, fd, place, has_name)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def check_place(place: Path) -> None:
    """Find out before any work whether a file can be put at ``place``.

    Raises:
        ConversionError: says why it cannot.
    """
    if place.is_dir():
        raise ConversionError(f"{place} is a directory; name a file in it: {place / 'data.beton'}")
    if not place.parent.is_dir():
        raise ConversionError(
            f"{place} cannot be written: the folder {str(place.parent)!r} does not exist; "
            f"make it with: mkdir -p {place.parent}"
        )
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise ConversionError(
            f"{place} cannot be written: this user may not write in {str(place.parent)!r}"
        )


def _opened(path: Path, place: Path) -> tuple[int, bool]:
    """Open a file in the folder of ``path``, without a name where that can be."""
    # Linux only, and not on every file system: network ones refuse it in several ways.
    without_name = getattr(os, "O_TMPFILE", None)
    if without_name is not None:
        with suppress(OSError):
            return os.open(path.parent, os.O_RDWR | without_name, 0o666), False
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except OSError as error:
        raise ConversionError(f"{place} cannot be written: {one_line(error)}") from error


def _give_name(fd: int, path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY)
    try:  # with a directory's number os.link calls linkat, which follows the link in /proc
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=directory)
    finally:
        os.close(directory)


def _remove_abandoned(place: Path) -> None:
    """Remove what an earlier conversion left when all of its processes were killed at once."""
    for path in place.parent.glob(f".{place.name}.*.part"):
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:
            continue  # just renamed or removed, or another user's
        try:
            with suppress(OSError):  # somebody is writing it
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        finally:
            os.close(fd)

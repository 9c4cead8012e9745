"""Where converted files are kept, and how they are found again.

One file a dataset and way of storing it, named by both their fingerprints. Processes that start
together convert it once: the first holds a lock, which ends with it however it ends.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchweld.errors import TorchweldError
from torchweld.guard import one_line
from torchweld_ffcv.beginning import random_state_kept
from torchweld_ffcv.beton import read_beton
from torchweld_ffcv.conversion import Wishes, convert_source
from torchweld_ffcv.errors import BetonError, ConversionError
from torchweld_ffcv.fingerprint import fingerprint
from torchweld_ffcv.foreign import kinds_of
from torchweld_ffcv.sources import Source, as_source

_NAME_DIGITS = 16
_FAILED = "failed: "
_RANK = "rank {}: "


def cached_beton(
    source: Any,
    *,
    spec: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
    progress: bool | None = None,
    cache_dir: str | Path | None = None,
    skip_bad: bool = False,
) -> Path:
    """Return the ``.beton`` file of a dataset, converting it where no earlier run has.

    Every process of a run calls it with the same source. One of those that share the folder
    converts; the others wait for it and say so. When it fails, they fail with its error.

    Args:
        source: a map-style Dataset, a DataLoader, a folder of images in class folders, or an
            iterable that can be iterated again.
        spec: field name to a kind of :mod:`torchweld_ffcv.kinds` or a field object of FFCV (what
            is stored, not what is done while reading); None: found out from the first samples.
        rank: of this process, for messages.
        world_size: processes that call it.
        barrier: called by every process once the file is there, if given.
        progress: show a progress bar in the process that converts; None: on a terminal.
        cache_dir: folder of the files; None: ``$XDG_CACHE_HOME/torchweld/ffcv``, where
            ``XDG_CACHE_HOME`` is ``~/.cache`` if not set.
        skip_bad: leave out samples that cannot be read or stored.

    Raises:
        ConversionError: the dataset cannot be converted; names the sample.
        InvalidArgument: the source is no dataset, or cannot be recognised the next time.
    """
    found, fields = as_source(source), kinds_of(spec)
    with random_state_kept():
        mark = fingerprint(found, fields, skip_bad=skip_bad)
    place = _directory(cache_dir) / f"{_words(found)}{mark[:_NAME_DIGITS]}.beton"
    says = _RANK.format(rank) if world_size > 1 else ""
    bar = sys.stderr.isatty() if progress is None else progress
    wishes = Wishes(fields=fields, progress=bar, fingerprint=mark, skip_bad=skip_bad)
    if not _is_whole(place, mark):
        with _lock(place, says) as lock:
            if not _is_whole(place, mark):  # meanwhile another process may have written it
                _convert(found, place, lock, wishes, says)
    else:
        _say(f"{says}using {place} (fingerprint matches)")
    if barrier is not None:
        barrier()
    return place


def _convert(found: Source, place: Path, lock: int, wishes: Wishes, says: str) -> None:
    count = f"{found.length:,} samples" if found.length is not None else "the samples"
    _say(f"{says}converting {count} of {found.label} to {place}, once")
    os.ftruncate(lock, 0)
    try:
        done = convert_source(found, place, wishes)
    except TorchweldError as error:
        os.pwrite(lock, (_FAILED + str(error)).encode(), 0)
        raise
    count = f"{done.num_samples:,} samples"
    _say(f"{says}converted {count} in {done.seconds:.1f} s, {done.num_bytes:,} bytes")


def _is_whole(place: Path, mark: str) -> bool:
    if not place.exists():
        return False
    try:
        return read_beton(place).fingerprint == mark
    except BetonError as error:
        _say(f"{error}; converting again")
        return False


@contextmanager
def _lock(place: Path, says: str) -> Iterator[int]:
    """Hold the lock of a file.

    Raises:
        ConversionError: whoever had it meanwhile could not convert the dataset.
    """
    fd = os.open(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _locked_at_once(fd):
            _say(f"{says}waiting for another process that converts to {place}")
            fcntl.flock(fd, fcntl.LOCK_EX)
            said = os.pread(fd, 1 << 16, 0).decode(errors="replace")
            if said.startswith(_FAILED) and not place.exists():
                raise ConversionError(said.removeprefix(_FAILED))
        yield fd
    finally:
        os.close(fd)  # and with it the lock


def _locked_at_once(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConversionError(
            f"the folder for converted datasets has no file locks ({one_line(error)}), so "
            "processes would overwrite each other there; choose a local one: "
            "data=use('ffcv', cache_dir=…)"
        ) from error
    return True


def _directory(chosen: str | Path | None) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(chosen) if chosen is not None else Path(base) / "torchweld" / "ffcv"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConversionError(
            f"converted datasets cannot be kept in {directory}: {one_line(error)}; choose another "
            "folder: data=use('ffcv', cache_dir=…)"
        ) from error
    return directory


def _words(source: Source) -> str:
    """The beginning of the file's name, for people: ``imagenet-train-``."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", source.label.removeprefix("the ")).strip("-")
    return f"{words[-40:].lstrip('-')}-" if words else ""


def _say(text: str) -> None:
    # Standard error, where a progress bar is; a waiting process must not seem to hang.
    sys.stderr.write(f"ffcv: {text}\n")
    sys.stderr.flush()

"""Write a checkpoint from all ranks: every file first, the name last."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchweld.checkpoint import files
from torchweld.checkpoint.collect import (
    Entry,
    check_json,
    collect_entries,
    copy_entries,
    file_entry,
)
from torchweld.checkpoint.format import (
    FORMAT,
    MANIFEST,
    Index,
    index_path,
    is_checkpoint,
    read_index,
    seal_manifest,
    tensors_path,
)
from torchweld.checkpoint.pieces import Piece, cover_problem
from torchweld.errors import CheckpointError

if TYPE_CHECKING:
    from torchweld.interfaces import Shard

Exchange = Callable[[str, str], list[str]]
"""``(label, my text) -> texts of all ranks in rank order``; waits for every rank."""


def alone(label: str, text: str) -> list[str]:  # noqa: ARG001 - the form of an Exchange
    """Be the exchange of a single process."""
    return [text]


def rank_name(rank: int, name: str) -> str:
    """Return the name of a tensor that every rank has its own of, e.g. a random state."""
    return f"rank/{rank:05d}/{name}"


def write(
    path: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    exchange: Exchange = alone,
    shards: Iterable[Shard],
    tensors: Mapping[str, Tensor] | None = None,
    header: Mapping[str, Any],
    state: Any = None,
) -> Path:
    """Write a checkpoint directory; every rank calls it with the same path.

    The directory is built as ``.<name>.part`` beside its place, fsynced, checked by rank 0 (every
    tensor covered exactly once), and renamed in one step. A checkpoint that is already there is
    kept until the new one is complete, then replaced by two renames; should the machine stop
    between the two, the old one is ``.<name>.old`` and is still found by ``find``. Live tensors
    are copied to the CPU one by one while they are written: memory for the largest is enough.

    Args:
        path: of the directory to make, on a file system that all ranks share.
        rank: of this process.
        world_size: number of processes.
        exchange: waits for all ranks and carries each one's outcome; called three times with
            labels that come again at the next checkpoint.
        shards: the pieces of model and optimizer that this rank is to write; their memory must
            keep its values until ``write`` returns.
        tensors: further whole tensors that this rank alone writes; see :func:`rank_name`.
        header: of rank 0; strict JSON (see :func:`~torchweld.checkpoint.state.encode`). The
            keys ``step``, ``epoch``, ``samples``, ``plan``, ``model_digest``, ``metrics`` and
            ``groups`` are shown by ``inspect`` and used by ``find``.
        state: strict JSON of this rank alone, e.g. Python's random state.

    Returns:
        The path.

    Raises:
        CheckpointError: on all ranks, naming the ranks that failed and why; nothing is left.
    """
    draft = Draft(Path(path), rank, world_size, header, state)
    draft.take_in(exchange, lambda: collect_entries(shards, tensors or {}))
    return draft.finish(exchange)


def snapshot(
    path: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    exchange: Exchange = alone,
    shards: Iterable[Shard],
    tensors: Mapping[str, Tensor] | None = None,
    header: Mapping[str, Any],
    state: Any = None,
) -> Draft:
    """Copy to the CPU what a checkpoint is to hold; ``finish`` writes it, in any thread.

    Everything given may be changed afterwards. Needs memory for all of this rank's pieces.

    Args:
        path: as the other arguments, those of :func:`write`; ``exchange`` is called once.

    Raises:
        CheckpointError: on all ranks, naming the ranks that failed and why.
    """
    draft = Draft(Path(path), rank, world_size, header, state)
    draft.take_in(exchange, lambda: copy_entries(collect_entries(shards, tensors or {})))
    draft.state = json.loads(json.dumps(draft.state))
    draft.header = json.loads(json.dumps(draft.header)) if rank == 0 else {}
    return draft


@dataclass
class Draft:
    """A checkpoint that is being made, as one rank sees it.

    Rank 0 owns the directory. Another rank removes what it has written only until it has said so:
    after that rank 0 may be about to give the directory its name.
    """

    path: Path
    rank: int
    world_size: int
    header: Mapping[str, Any]
    state: Any
    entries: list[Entry] = field(default_factory=list)

    def take_in(self, exchange: Exchange, collect: Callable[[], list[Entry]]) -> None:
        """Collect what this rank is to write, and make the directory; all ranks call it.

        Raises:
            CheckpointError: on all ranks, naming the ranks that failed and why; nothing is left.
        """

        def prepare() -> str:
            self.entries = collect()
            _make_part(self.path, self.rank, self.header, self.state)
            return self.path.name

        try:
            _check_names(self._together(exchange)("ready", prepare))
        except BaseException:  # also Ctrl-C: nothing half-written may stay
            self.discard()
            raise

    def finish(self, exchange: Exchange) -> Path:
        """Write, and give the directory its name once every rank has written; all call it.

        Raises:
            CheckpointError: on all ranks, naming the ranks that failed and why; nothing is left.
        """
        together = self._together(exchange)
        announced = False

        def write_mine() -> dict[str, Any]:
            nonlocal announced
            stamp = _write_rank(self.path, self.rank, self.entries, self.state)
            announced = True
            return stamp

        try:
            stamps = together("written", write_mine)
            together("complete", lambda: _complete(self.path, self.rank, stamps, self.header))
        except BaseException:
            if self.rank == 0 or not announced:
                self.discard()
            raise
        return self.path

    def _together(self, exchange: Exchange) -> _Together:
        return _Together(self.path, self.world_size, exchange)

    def discard(self) -> None:
        """Remove what this rank may remove of a checkpoint that will not be completed."""
        part = partial_path(self.path)
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            return
        for file in (tensors_path(part, self.rank), index_path(part, self.rank)):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # gone already, or with files of other ranks in it
            part.rmdir()


def partial_path(path: Path) -> Path:
    """Return where a checkpoint is built before it gets its name."""
    return path.with_name(f".{path.name}.part")


def old_path(path: Path) -> Path:
    """Return where a checkpoint waits while another takes its name."""
    return path.with_name(f".{path.name}.old")


@dataclass(frozen=True)
class _Together:
    """Does one thing on every rank and raises on all of them when one could not."""

    path: Path
    world_size: int
    exchange: Exchange

    def __call__(self, label: str, work: Callable[[], Any]) -> list[Any]:
        cause: Exception | None = None
        try:
            mine = {"done": work()}
        except Exception as error:  # noqa: BLE001 - a strategy's code; the others must hear of it
            cause, mine = error, {"failed": _one_line(error)}
        texts = self.exchange(f"checkpoint/{label}", json.dumps(mine))
        if len(texts) != self.world_size:
            raise CheckpointError(
                f"{len(texts)} of {self.world_size} ranks took part in writing {self.path}"
            )
        outcomes = [json.loads(text) for text in texts]
        failed = {rank: out["failed"] for rank, out in enumerate(outcomes) if "failed" in out}
        if failed:
            reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in failed.items())
            raise CheckpointError(
                f"the checkpoint {self.path} was not written - {reasons} - nothing of it was kept"
            ) from cause
        return [outcome["done"] for outcome in outcomes]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def _check_names(names: list[Any]) -> None:
    if len(set(names)) > 1:
        raise CheckpointError(f"the ranks would write checkpoints of different names: {names}")


def _make_part(path: Path, rank: int, header: Mapping[str, Any], state: Any) -> None:
    check_json(state, "state")
    if rank != 0:
        return
    check_json(header, "header")
    _check_place(path)
    files.make_directory(path.parent)
    shutil.rmtree(partial_path(path), ignore_errors=True)
    partial_path(path).mkdir()


def _check_place(path: Path) -> None:
    if path.exists() and not is_checkpoint(path) and not _is_empty_directory(path):
        raise CheckpointError(
            f"{path} exists and is no checkpoint; it would be replaced: choose another name"
        )


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _write_rank(path: Path, rank: int, entries: list[Entry], state: Any) -> dict[str, Any]:
    part = partial_path(path)
    # Rank 0 made it, but a network file system may show it late.
    part.mkdir(exist_ok=True)
    stamp = files.write_tensors(
        tensors_path(part, rank), [file_entry(entry) for entry in entries], {}
    )
    index = Index(rank, stamp, tuple(entry.stored for entry in entries), state)
    return files.write_json(index_path(part, rank), index.to_json()).to_json()


def _complete(path: Path, rank: int, stamps: list[Any], header: Mapping[str, Any]) -> str:
    if rank != 0:
        return path.name
    part = partial_path(path)
    _check_cover(part, stamps)
    files.write_json(part / MANIFEST, seal_manifest(_manifest(stamps, header)))
    files.sync_directory(part)
    _take_place(part, path)
    return path.name


def _manifest(stamps: list[Any], header: Mapping[str, Any]) -> dict[str, Any]:
    now = time.time()
    return {
        "format": FORMAT,
        "torchweld": _version(),
        "torch": str(torch.__version__),
        "world_size": len(stamps),
        "created": datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="seconds"),
        "time": now,
        **{key: header.get(key, 0) for key in ("step", "epoch", "samples")},
        "ranks": stamps,
        "header": dict(header),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("torchweld")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source folder


def _check_cover(part: Path, stamps: list[Any]) -> None:
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, set[str]] = {}
    for rank, stamp in enumerate(stamps):
        _check_seen(part, rank, files.Stamp(stamp["bytes"], stamp["sha256"]))
        for stored in read_index(part, rank).stored:
            pieces.setdefault(stored.name, []).append(stored.piece)
            dtypes.setdefault(stored.name, set()).add(stored.dtype)
    problems = [f"{name!r}: {why}" for name, its in pieces.items() if (why := cover_problem(its))]
    problems += [f"{name!r} is {sorted(its)}" for name, its in dtypes.items() if len(its) > 1]
    if problems:
        raise CheckpointError("the pieces of all ranks do not fit: " + "; ".join(problems[:5]))


def _check_seen(part: Path, rank: int, stamp: files.Stamp) -> None:
    damage = stamp.damage(index_path(part, rank), contents=True)
    if damage:
        raise CheckpointError(
            f"the files of rank {rank} are not in {part} ({damage}); it must lie on a file system "
            "that all processes share"
        )


def _take_place(part: Path, path: Path) -> None:
    old = old_path(path)
    if not path.exists():
        part.rename(path)
    else:
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        try:
            part.rename(path)
        except OSError:
            old.rename(path)
            raise
    files.sync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)

"""Write a checkpoint from all ranks: every file first, the name last."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchweld.checkpoint import files
from torchweld.checkpoint.collect import Entry, check_json, collect_entries, file_entry
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
    path, entries = Path(path), list[Entry]()
    together = _Together(path, rank, world_size, exchange)

    def prepare() -> str:
        entries.extend(collect_entries(shards, tensors or {}))
        _make_part(path, rank, header, state)
        return path.name

    try:
        _check_names(together("ready", prepare))
        stamps = together("written", lambda: _write_rank(path, rank, entries, state))
        together("complete", lambda: _complete(path, rank, stamps, header))
    except BaseException:  # also Ctrl-C: nothing half-written may stay
        shutil.rmtree(partial_path(path), ignore_errors=True)
        raise
    return path


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
    rank: int
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
    # Rank 0 made it, but a network file system may show it late, and a rank that was slow to clean
    # up after a failed write may just have removed it.
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

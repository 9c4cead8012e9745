"""Write a checkpoint from all ranks: every file first, the name last."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchweld.checkpoint import files
from torchweld.checkpoint.format import (
    FORMAT,
    MANIFEST,
    Index,
    Stored,
    index_path,
    is_checkpoint,
    read_index,
    seal_manifest,
    tensors_path,
)
from torchweld.checkpoint.pieces import Piece, cover_problem, find_overlap
from torchweld.checkpoint.state import TAG, dtype_name
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


def write(  # noqa: PLR0913 - keywords only, each a different thing
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
    are copied to the CPU one by one while they are written.

    Args:
        path: of the directory to make, on a file system that all ranks share.
        rank: of this process.
        world_size: number of processes.
        exchange: waits for all ranks and carries each one's outcome; labels may come again.
        shards: the pieces of model and optimizer that this rank is to write.
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
    path = Path(path)
    step = _Together(path, rank, world_size, exchange)
    try:
        entries: list[_Entry] = []
        step("ready", lambda: _prepare(path, rank, entries, shards, tensors or {}, header, state))
        stamps = step("written", lambda: _write_rank(path, rank, entries, state))
        step("complete", lambda: _complete(path, rank, stamps, header))
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
        where = f"checkpoint/{self.path.parent.name}/{self.path.name}/{label}"
        outcomes = [json.loads(text) for text in self.exchange(where, json.dumps(mine))]
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


@dataclass(frozen=True)
class _Entry:
    stored: Stored
    tensor: Tensor


def _prepare(  # noqa: PLR0913 - the arguments of write
    path: Path,
    rank: int,
    entries: list[_Entry],
    shards: Iterable[Shard],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    state: Any,
) -> str:
    entries.extend(collect_entries(shards, tensors))
    check_json(state, "state")
    if rank == 0:
        check_json(header, "header")
        _check_place(path)
        files.make_directory(path.parent)
        shutil.rmtree(partial_path(path), ignore_errors=True)
        partial_path(path).mkdir()
    return path.name


def _check_place(path: Path) -> None:
    if path.exists() and not is_checkpoint(path) and not _is_empty_directory(path):
        raise CheckpointError(
            f"{path} exists and is no checkpoint; it would be replaced: choose another name"
        )


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def collect_entries(shards: Iterable[Shard], tensors: Mapping[str, Tensor]) -> list[_Entry]:
    """Take in the pieces of this rank and refuse what cannot be read back.

    Raises:
        CheckpointError: pieces overlap, lie outside their tensor, or are no plain tensors.
    """
    pieces: dict[str, list[Piece]] = {}
    entries = []
    for name, local, shape, start in _named(shards, tensors):
        piece = Piece(shape, start, tuple(local.shape))
        _check_piece(name, local, piece)
        if piece.numel == 0 and math.prod(shape) > 0:
            continue  # an uneven shard: this rank has nothing of it
        number = len(pieces.setdefault(name, []))
        pieces[name].append(piece)
        key = f"{name}@{number}" if number else name
        entries.append(_Entry(Stored(name, key, dtype_name(local.dtype), piece), local))
    for name, several in pieces.items():
        overlap = find_overlap(several) or (len(several) > 1 and not several[0].numel)
        if overlap:
            raise CheckpointError(f"{name!r} is given twice: {several[0]} and {several[1]} overlap")
    files.check_keys(entry.stored.key for entry in entries)
    return entries


def _named(shards: Iterable[Shard], tensors: Mapping[str, Tensor]) -> Iterable[Any]:
    for shard in shards:
        start = shard.start if isinstance(shard.start, int) else tuple(shard.start)
        yield shard.name, shard.local, tuple(shard.global_shape), start
    for name, tensor in tensors.items():
        yield name, tensor, tuple(tensor.shape), (0,) * tensor.ndim


def _check_piece(name: str, local: Tensor, piece: Piece) -> None:
    plain = type(local) in (Tensor, nn.Parameter) and local.layout is torch.strided
    if not plain or local.is_meta or local.is_quantized:
        raise CheckpointError(
            f"{name!r} is a {type(local).__qualname__} with layout {local.layout} on "
            f"{local.device}; a piece must be a plain dense tensor with data (a DTensor's local one)"
        )
    if piece.problem():
        raise CheckpointError(f"{name!r}: {piece.problem()}")


def check_json(value: object, where: str) -> None:
    """Refuse what JSON would change without a word.

    Raises:
        CheckpointError: something is no str-keyed dict, list, str, bool, None or number.
    """
    if type(value) is dict and all(type(key) is str for key in value):
        for key, item in value.items():
            check_json(item, f"{where}[{key!r}]")
    elif type(value) is list:
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif type(value) not in (str, bool, int, type(None)) and not _is_finite(value):
        raise CheckpointError(
            f"{where} is {value!r} of type {type(value).__qualname__}, which JSON would change; "
            f"pass it through torchweld.checkpoint.encode, which writes it under {TAG!r}"
        )


def _is_finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


def _write_rank(path: Path, rank: int, entries: list[_Entry], state: Any) -> dict[str, Any]:
    part = partial_path(path)
    part.mkdir(exist_ok=True)  # of rank 0; a network file system may show it late
    stamp = files.write_tensors(
        tensors_path(part, rank), [_to_file(entry) for entry in entries], {}
    )
    index = Index(rank, stamp, tuple(entry.stored for entry in entries), state)
    return files.write_json(index_path(part, rank), index.to_json()).to_json()


def _to_file(entry: _Entry) -> files.Entry:
    tensor, key = entry.tensor, entry.stored.key
    dtype = files.SAFE_DTYPES.get(tensor.dtype)
    load = partial(_same, tensor)
    if dtype is None:
        return files.Entry(key, "U8", (tensor.numel() * tensor.itemsize,), 1, load)
    return files.Entry(key, dtype, (tensor.numel(),), tensor.itemsize, load)


def _same(tensor: Tensor) -> Tensor:
    return tensor


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
    dtypes: dict[str, str] = {}
    for rank, stamp in enumerate(stamps):
        damage = files.Stamp(stamp["bytes"], stamp["sha256"]).damage(
            index_path(part, rank), contents=True
        )
        if damage:
            raise CheckpointError(
                f"the files of rank {rank} are not in {part} ({damage}); the folder must lie on a "
                "file system that all processes share"
            )
        for stored in read_index(part, rank).stored:
            pieces.setdefault(stored.name, []).append(stored.piece)
            if dtypes.setdefault(stored.name, stored.dtype) != stored.dtype:
                raise CheckpointError(
                    f"{stored.name!r} is {dtypes[stored.name]} on one rank, {stored.dtype} on another"
                )
    problems = [f"{name!r}: {why}" for name, its in pieces.items() if (why := cover_problem(its))]
    if problems:
        raise CheckpointError("the pieces of all ranks do not fit: " + "; ".join(problems[:5]))


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

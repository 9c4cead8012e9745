"""Take in what one rank is to write, and refuse what could not be read back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchweld.checkpoint import files
from torchweld.checkpoint.format import Stored
from torchweld.checkpoint.pieces import Piece, find_overlap
from torchweld.checkpoint.state import TAG, dtype_name
from torchweld.errors import CheckpointError

if TYPE_CHECKING:
    from torchweld.interfaces import Shard


@dataclass(frozen=True)
class Entry:
    """One piece to write; ``tensor`` aliases live memory, unless it was copied."""

    stored: Stored
    tensor: Tensor


def collect_entries(shards: Iterable[Shard], tensors: Mapping[str, Tensor]) -> list[Entry]:
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
        entries.append(Entry(Stored(name, key, dtype_name(local.dtype), piece), local))
    for name, several in pieces.items():
        overlap = find_overlap(several) or (len(several) > 1 and not several[0].numel)
        if overlap:
            raise CheckpointError(f"{name!r} is given twice: {several[0]} and {several[1]} overlap")
    files.check_keys(entry.stored.key for entry in entries)
    return entries


def copy_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Copy the pieces to the CPU; what they were taken from may change from then on.

    From CUDA they go into pinned memory, all at once, and the current stream is waited for.
    """
    entries = list(entries)
    copied = [replace(entry, tensor=_copy(entry.tensor.detach())) for entry in entries]
    for device in {entry.tensor.device for entry in entries if entry.tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copied


def _copy(tensor: Tensor) -> Tensor:
    pinned = tensor.is_cuda
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor, non_blocking=pinned)


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
            f"{local.device}; a piece must be a plain dense tensor with data"
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


def file_entry(entry: Entry) -> files.Entry:
    """Return how a piece is stored: flattened, in bytes where its dtype is a rare one."""
    tensor, key = entry.tensor, entry.stored.key
    dtype = files.SAFE_DTYPES.get(tensor.dtype)
    load = partial(_same, tensor)
    if dtype is None:
        return files.Entry(key, "U8", (tensor.numel() * tensor.itemsize,), 1, load)
    return files.Entry(key, dtype, (tensor.numel(),), tensor.itemsize, load)


def _same(tensor: Tensor) -> Tensor:
    return tensor

"""Consolidated weights as one safetensors file, and weights read back without pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from torchweld.checkpoint import files
from torchweld.checkpoint.format import is_checkpoint
from torchweld.checkpoint.pieces import Piece, copy_overlap, cover_problem
from torchweld.checkpoint.reader import Checkpoint
from torchweld.checkpoint.state import dtype_name
from torchweld.errors import CheckpointError

if TYPE_CHECKING:
    from torchweld.interfaces import Shard, ShardReader

MODEL_PREFIX = "model/"

_EXPORT_DTYPES = {
    **files.SAFE_DTYPES,
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
_PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}


def export_weights(
    checkpoint: ShardReader,
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    prefix: str = MODEL_PREFIX,
) -> Path:
    """Write the weights of an opened checkpoint as one safetensors file, tensor by tensor.

    Args:
        checkpoint: an opened :class:`Checkpoint`.
        path: of the file; written beside its place and renamed, so it is whole or the old one.
        metadata: strings for the file's header, e.g. the surgeries that renamed parameters.
        prefix: of the tensors to write, cut from their names.

    Returns:
        The path.

    Raises:
        CheckpointError: no tensor has the prefix, or one has a dtype that safetensors lacks.
    """
    entries = []
    for name in checkpoint.names():
        if name.startswith(prefix):
            shape, dtype = checkpoint.info(name)
            load = partial(_read_whole, checkpoint, name)
            entries.append(_entry(name.removeprefix(prefix), shape, dtype, load))
    return _write(Path(path), entries, metadata or {})


def export_shards(
    shards: Iterable[Shard],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    prefix: str = MODEL_PREFIX,
) -> Path:
    """Write weights whose pieces are all on this rank, as :func:`export_weights` does.

    Raises:
        CheckpointError: pieces are missing here (write a checkpoint and export that instead).
    """
    by_name: dict[str, list[Shard]] = {}
    for shard in shards:
        if shard.name.startswith(prefix):
            by_name.setdefault(shard.name, []).append(shard)
    entries = []
    for name, several in by_name.items():
        problem = cover_problem([_piece(shard) for shard in several])
        if problem:
            raise CheckpointError(
                f"{name!r} cannot be exported from this rank alone: {problem}; write a checkpoint "
                "and export that"
            )
        shape, dtype = tuple(several[0].global_shape), several[0].local.dtype
        entries.append(_entry(name.removeprefix(prefix), shape, dtype, partial(_join, several)))
    return _write(Path(path), entries, metadata or {})


def load_weights(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read weights for a model: canonical names to tensors on the CPU.

    Args:
        source: a ``.safetensors`` file, a checkpoint directory, or a mapping.

    Raises:
        CheckpointError: the file is missing or damaged, or holds pickle, which runs whatever code
            its author put in; the message says how to convert it.
    """
    if isinstance(source, Mapping):
        return _checked(source)
    path = Path(source)
    if path.is_dir():
        return _from_checkpoint(path)
    if path.suffix in _PICKLED:
        raise CheckpointError(
            f"{path} is a pickle file, and reading one can run any code; if you trust it, convert "
            "it once with: python -c 'import torch, safetensors.torch as s; "
            f's.save_file(torch.load("{path}", weights_only=True), '
            f'"{path.with_suffix(".safetensors")}")\''
        )
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"no weights at {path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no intact safetensors file: {error}") from error


def _from_checkpoint(path: Path) -> dict[str, Tensor]:
    if not is_checkpoint(path):
        raise CheckpointError(f"{path} is a directory but no checkpoint; give a .safetensors file")
    checkpoint = Checkpoint.open(path)
    names = [name for name in checkpoint.names() if name.startswith(MODEL_PREFIX)]
    return {name.removeprefix(MODEL_PREFIX): checkpoint.tensor(name) for name in names}


def _checked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"weights must be tensors by name, {name!r} is a {type(value).__qualname__}"
            )
    return dict(weights)


def _entry(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], Tensor]
) -> files.Entry:
    if dtype not in _EXPORT_DTYPES:
        raise CheckpointError(
            f"{name!r} has dtype {dtype_name(dtype)}, which a safetensors file cannot hold"
        )
    return files.Entry(name, _EXPORT_DTYPES[dtype], shape, dtype.itemsize, load)


def _write(path: Path, entries: list[files.Entry], metadata: Mapping[str, str]) -> Path:
    if not entries:
        raise CheckpointError(f"nothing to export to {path}: no tensor of a model is there")
    wrong = {key: text for key, text in _untyped(metadata).items() if type(text) is not str}
    if wrong:
        raise CheckpointError(f"metadata of {path} must be strings, which {wrong} is not")
    part = path.with_name(f".{path.name}.part")
    try:
        files.make_directory(path.parent)
        part.unlink(missing_ok=True)
        files.write_tensors(part, entries, {"format": "pt", **metadata})
        part.replace(path)
        files.sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"the weights were not written to {path} - {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _untyped(metadata: Mapping[str, object]) -> dict[str, object]:
    return dict(metadata)


def _read_whole(checkpoint: ShardReader, name: str) -> Tensor:
    shape, dtype = checkpoint.info(name)
    whole = torch.empty(shape, dtype=dtype)
    checkpoint.fill(name, whole, (0,) * len(shape))
    return whole


def _piece(shard: Shard) -> Piece:
    start = shard.start if isinstance(shard.start, int) else tuple(shard.start)
    return Piece(tuple(shard.global_shape), start, tuple(shard.local.shape))


def _join(shards: list[Shard]) -> Tensor:
    first = shards[0]
    if math.prod(first.global_shape) == first.local.numel():
        return first.local.detach().reshape(first.global_shape)
    whole = torch.empty(first.global_shape, dtype=first.local.dtype)
    target = Piece(tuple(first.global_shape), (0,) * whole.ndim, tuple(whole.shape))
    for shard in shards:
        flat = shard.local.detach().to("cpu").reshape(-1)
        copy_overlap(target, whole, _piece(shard), flat)
    return whole

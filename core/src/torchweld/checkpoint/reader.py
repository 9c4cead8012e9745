"""Read a checkpoint: any number of writers, any pieces, checksums verified."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from torchweld.checkpoint.files import SAFE_DTYPES
from torchweld.checkpoint.format import (
    Index,
    Stored,
    find_damage,
    read_index,
    read_manifest,
    tensors_path,
)
from torchweld.checkpoint.pieces import Piece, copy_overlap, cover_problem
from torchweld.checkpoint.state import decode_with, dtype_from, dtype_name
from torchweld.checkpoint.writer import rank_name
from torchweld.errors import CheckpointDamaged, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint:
    """An opened checkpoint; a ``ShardReader``. Tensors are mapped and read when they are asked for.

    Attributes:
        path: of the directory.
        manifest: what the writer said about it.
        header: what the caller of ``write`` gave.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], indexes: Sequence[Index]) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.manifest = manifest
        self.header: Mapping[str, Any] = manifest["header"]
        self._indexes = tuple(indexes)
        self._pieces = _by_name(path, indexes)
        self._files: dict[int, Any] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Checkpoint:
        """Open the checkpoint at ``path``.

        Args:
            path: of its directory.
            verify: read every file and compare its checksum. Under several ranks one of them may
                do it for all; with False sizes, manifest and indexes are still compared.

        Raises:
            CheckpointDamaged: names every file that is missing, truncated or changed.
            CheckpointError: there is no checkpoint at ``path``, or it has a newer format.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        damage = find_damage(directory, contents=verify)
        if damage:
            raise CheckpointDamaged(f"the checkpoint {directory} is damaged: " + "; ".join(damage))
        indexes = [read_index(directory, rank) for rank in range(len(manifest["ranks"]))]
        return cls(directory, manifest, indexes)

    def names(self) -> Iterable[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._pieces)

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the global shape and the dtype.

        Raises:
            CheckpointError: there is no such tensor.
        """
        _, stored = self._of(name)[0]
        return stored.piece.global_shape, dtype_from(stored.dtype)

    def fill(self, name: str, local: Tensor, start: int | Sequence[int]) -> None:
        """Copy a piece of a tensor into ``local``, on any device, with any strides.

        Args:
            name: of the tensor.
            local: written in place.
            start: an int is a position in the flattened tensor, else the corner of a box.

        Raises:
            CheckpointError: no such tensor, another dtype, or not inside its shape.
        """
        shape, dtype = self.info(name)
        if local.dtype != dtype:
            raise CheckpointError(
                f"{name}: the checkpoint {self.path} has {dtype_name(dtype)}, asked for "
                f"{dtype_name(local.dtype)}: resume with the precision and the strategy it was "
                "saved with (some keep fp32 weights under a lower precision), or export its "
                "weights and begin anew with init_weights=, which casts them"
            )
        corner = start if isinstance(start, int) else tuple(start)
        target = Piece(shape, corner, tuple(local.shape))
        if target.problem():
            raise CheckpointError(
                f"{name}: asked for {target}, the checkpoint {self.path} has shape {list(shape)}"
            )
        with torch.no_grad():
            if isinstance(corner, int) and not local.is_contiguous():
                whole = torch.empty(local.shape, dtype=dtype)
                self._copy(name, target, whole)
                local.detach().copy_(whole)
            else:
                self._copy(name, target, local.detach())

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU, in memory of its own."""
        shape, dtype = self.info(name)
        whole = torch.empty(shape, dtype=dtype)
        self.fill(name, whole, (0,) * len(shape))
        return whole

    def rank_tensors(self, rank: int) -> dict[str, Tensor]:
        """Return the tensors named ``rank/<rank>/…``, without that prefix."""
        prefix = rank_name(rank, "")
        return {
            n.removeprefix(prefix): self.tensor(n) for n in self.names() if n.startswith(prefix)
        }

    def rank_state(self, rank: int) -> Any:
        """Return the ``state`` that this rank gave to ``write``; None beyond the writers."""
        return self._indexes[rank].state if rank < len(self._indexes) else None

    def decode(self, encoded: object) -> Any:
        """Rebuild a state from the header; its tensors were saved under their keys."""
        return decode_with(encoded, self.tensor)

    def _of(self, name: str) -> list[tuple[int, Stored]]:
        if name not in self._pieces:
            near = difflib.get_close_matches(name, self._pieces, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(f"the checkpoint {self.path} has no tensor {name!r}{hint}")
        return self._pieces[name]

    def _copy(self, name: str, target: Piece, local: Tensor) -> None:
        for rank, stored in self._of(name):
            if stored.piece.numel:
                copy_overlap(target, local, stored.piece, self._flat(rank, stored))

    def _flat(self, rank: int, stored: Stored) -> Tensor:
        path = tensors_path(self.path, rank)
        try:
            if rank not in self._files:
                self._files[rank] = safe_open(path, framework="pt", device="cpu")
            flat: Tensor = self._files[rank].get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointDamaged(f"{path}: {stored.key!r} cannot be read: {error}") from error
        dtype = dtype_from(stored.dtype)
        if dtype not in SAFE_DTYPES:
            flat = _from_bytes(flat, dtype)
        if flat.dtype != dtype or flat.shape != (stored.piece.numel,):
            raise CheckpointDamaged(
                f"{path}: {stored.key!r} is {list(flat.shape)} of {flat.dtype}, "
                f"its index says {stored.piece.numel} of {dtype}"
            )
        return flat


def _from_bytes(raw: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_complex:
        return raw.clone().view(dtype)  # cloned: the map need not be aligned for it
    real = {8: torch.float64, 4: torch.float32, 2: torch.float16}[dtype.itemsize // 2]
    return torch.view_as_complex(raw.clone().view(real).view(-1, 2))


def _by_name(path: Path, indexes: Sequence[Index]) -> dict[str, list[tuple[int, Stored]]]:
    pieces: dict[str, list[tuple[int, Stored]]] = {}
    for index in indexes:
        for stored in index.stored:
            pieces.setdefault(stored.name, []).append((index.rank, stored))
    for name, several in pieces.items():
        problem = cover_problem([stored.piece for _, stored in several])
        if problem or len({stored.dtype for _, stored in several}) > 1:
            raise CheckpointDamaged(
                f"{path}: {name}: {problem or 'its pieces have several dtypes'}"
            )
    return pieces

"""Shards of a model and its optimizer for a checkpoint, and back; nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchweld.errors import CheckpointError
from torchweld.interfaces import Shard, ShardReader
from torchweld.model.names import persistent_buffers
from torchweld.strategies.optimizer_state import (
    optimizer_shards,
    read_whole,
    restore_optimizer,
    whole,
)
from torchweld_fsdp.stepping import Piece

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Rows:
    """Where the rows of a shard lie in the whole tensor."""

    start: int
    count: int


def rows_of(total: int, rank: int, size: int) -> Rows:
    """Return which of ``total`` rows the ``rank``-th of ``size`` ranks holds.

    FSDP2 cuts dimension 0 into chunks of ceil(total / size) rows, as ``torch.chunk`` does; the
    last ranks have fewer, or none.
    """
    chunk = -(-total // size)
    start = min(rank * chunk, total)
    return Rows(start, min(start + chunk, total) - start)


class ShardedState:
    """Yields and fills the pieces of this rank.

    Args:
        model: sharded; for its buffers.
        pieces: of its parameters.
        mesh: the first of several replicas writes.
        rank: 0 writes what all ranks hold alike.
    """

    def __init__(
        self, model: nn.Module, pieces: Sequence[Piece], mesh: DeviceMesh, rank: int
    ) -> None:
        self._model, self._pieces, self._rank = model, pieces, rank
        shard = mesh["shard"]
        self._place, self._size = shard.get_local_rank(), shard.size()
        self._writes = mesh.ndim == 1 or mesh["replicate"].get_local_rank() == 0
        self._by_held: Mapping[int, Piece] = {id(piece.held): piece for piece in pieces}

    def shards(self, optimizer: Any | None) -> Iterator[Shard]:
        """Yield what this rank has to write."""
        for piece in self._pieces:
            yield from self._tensor(f"model/{piece.name}", piece.local, piece)
        if self._rank == 0:
            for name, buffer in persistent_buffers(self._model):
                yield from whole(f"model/{name}", buffer, None)
        if optimizer is not None:
            named = [(piece.name, piece.held) for piece in self._pieces]
            yield from optimizer_shards(
                optimizer, named, self._state_shards, writes_values=self._rank == 0
            )

    def _state_shards(self, name: str, value: Tensor, held: Any) -> Iterator[Shard]:
        piece = self._by_held[id(held)]
        if isinstance(value, DTensor):
            value = self._same_cut(name, value, piece)._local_tensor
        if value.dim() and value.shape == piece.local.shape:
            yield from self._tensor(name, value, piece)
        elif self._rank == 0:
            yield from whole(name, value, None)

    def _same_cut(self, name: str, value: DTensor, piece: Piece) -> DTensor:
        parameter: Any = piece.parameter
        if value.shape == parameter.shape and value.placements == parameter.placements:
            return value
        raise CheckpointError(
            f"{name!r} is spread over the processes in another way than its parameter "
            f"({value.placements}, shape {tuple(value.shape)}), which a checkpoint of fsdp cannot "
            "hold: use an optimizer whose state has the shape of its parameter"
        )

    def _tensor(self, name: str, local: Tensor, piece: Piece) -> Iterator[Shard]:
        if not isinstance(piece.parameter, DTensor):
            if self._rank == 0:
                yield from whole(name, local, None)
            return
        shape = tuple(piece.parameter.shape)
        rows = rows_of(shape[0], self._place, self._size)
        if self._writes and rows.count:
            yield Shard(name, local.detach(), shape, (rows.start, *(0,) * (len(shape) - 1)))

    # ---- back ------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, optimizer: Any | None, reader: ShardReader) -> None:
        """Fill parameters, buffers and optimizer state; the state before is cleared."""
        for piece in self._pieces:
            self._fill(reader, f"model/{piece.name}", piece.local, piece)
        for name, buffer in persistent_buffers(self._model):
            reader.fill(f"model/{name}", buffer, (0,) * buffer.dim())
        if optimizer is not None:
            named = [(piece.name, piece.held) for piece in self._pieces]
            restore_optimizer(optimizer, named, reader, self._read_state)

    def _fill(self, reader: ShardReader, name: str, local: Tensor, piece: Piece) -> None:
        if not isinstance(piece.parameter, DTensor):
            reader.fill(name, local, (0,) * local.dim())
            return
        shape = tuple(piece.parameter.shape)
        rows = rows_of(shape[0], self._place, self._size)
        if rows.count:
            reader.fill(name, local, (rows.start, *(0,) * (len(shape) - 1)))

    def _read_state(self, reader: ShardReader, name: str, held: Any) -> Tensor:
        piece = self._by_held[id(held)]
        parameter: Any = piece.parameter
        shape, dtype = reader.info(name)
        if not isinstance(parameter, DTensor) or shape != tuple(parameter.shape):
            return read_whole(reader, name, piece.local)
        local = torch.zeros_like(piece.local, dtype=dtype)
        self._fill(reader, name, local, piece)
        if held is not parameter:
            return local
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

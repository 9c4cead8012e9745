"""Checkpoint and memory of FairScale's FSDP: flat parts of every parameter, nothing gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchweld.interfaces import Env, Shard, ShardReader
from torchweld.model.names import canonical, persistent_buffers
from torchweld.strategies.optimizer_state import (
    optimizer_shards,
    read_whole,
    restore_optimizer,
    state_bytes,
    whole,
)

WRAPPERS = frozenset(
    {"_fsdp_wrapped_module", "_fpw_module", "_orig_mod", "_checkpoint_wrapped_module"}
)


def named_shards(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The model's own names, and the parameters: flat parts where there are several ranks."""
    return [(canonical(n, WRAPPERS), p) for n, p in model.named_parameters()]


class PieceState:
    """Yields and fills the parts of this rank.

    Args:
        root: the outermost wrapper, whose model this is.
        optimizer: over the parts; None for evaluation only.
        env: this rank among the others.
    """

    def __init__(self, root: Any, optimizer: Any | None, env: Env) -> None:
        self._root, self._optimizer, self._env = root, optimizer, env
        self._named = named_shards(root)

    def shards(self) -> Iterator[Shard]:
        """This rank's parts; what all ranks hold alike from rank 0."""
        for name, parameter in self._named:
            yield from self._parts(f"model/{name}", _held(parameter), parameter)
        if self._env.rank == 0:
            for name, buffer in self._buffers():
                yield from whole(f"model/{name}", buffer, None)
        if self._optimizer is not None:
            yield from optimizer_shards(
                self._optimizer,
                self._named,
                self._state_parts,
                writes_values=self._env.rank == 0,
            )

    @torch.no_grad()
    def restore(self, reader: ShardReader) -> None:
        """Fill parameters, buffers and optimizer state; the state before is cleared."""
        for name, parameter in self._named:
            self._fill(reader, f"model/{name}", _held(parameter), parameter)
        for name, buffer in self._buffers():
            reader.fill(f"model/{name}", buffer, (0,) * buffer.dim())
        if self._optimizer is not None:
            restore_optimizer(self._optimizer, self._named, reader, self._read_part)

    def bytes_per_rank(self) -> Mapping[str, int]:
        """Bytes of this rank's parts, padding included."""
        held = [(_held(p), p.requires_grad) for _, p in self._named]
        return {
            "parameters": sum(part.nbytes for part, _ in held),
            "gradients": sum(part.nbytes for part, trained in held if trained),
            "optimizer": state_bytes(self._optimizer) if self._optimizer is not None else 0,
        }

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        return ((canonical(n, WRAPPERS), b) for n, b in persistent_buffers(self._root))

    def _parts(self, name: str, part: Tensor, parameter: Any) -> Iterator[Shard]:
        if not parameter._is_sharded:
            yield from whole(name, part, None)
            return
        start, count = self._cut(parameter)
        if count:
            yield Shard(name, part.detach()[:count], tuple(parameter._orig_size), start)

    def _state_parts(self, name: str, value: Tensor, parameter: Any) -> Iterator[Shard]:
        if value.dim() and value.shape == _held(parameter).shape:
            yield from self._parts(name, value, parameter)
        elif self._env.rank == 0:
            yield from whole(name, value, None)

    def _fill(self, reader: ShardReader, name: str, part: Tensor, parameter: Any) -> None:
        if not parameter._is_sharded:
            reader.fill(name, part, (0,) * part.dim())
            return
        start, count = self._cut(parameter)
        if count:
            reader.fill(name, part[:count], start)

    def _read_part(self, reader: ShardReader, name: str, parameter: Any) -> Tensor:
        shape, dtype = reader.info(name)
        if not shape or shape != tuple(parameter._orig_size):
            return read_whole(reader, name, parameter)
        part = torch.zeros_like(_held(parameter), dtype=dtype)
        self._fill(reader, name, part, parameter)
        return part

    def _cut(self, parameter: Any) -> tuple[int, int]:
        """Where this rank's part begins in the flattened parameter, and how long it really is."""
        total = parameter._orig_size.numel()
        chunk = _held(parameter).numel()  # of every rank, the last ones padded
        start = min(self._env.rank * chunk, total)
        return start, min(chunk, total - start)


def _held(parameter: Any) -> Tensor:
    """This rank's part: what ``parameter`` shows between two steps."""
    part: Tensor = getattr(parameter, "_fp32_shard", parameter.detach())
    return part

"""What OSS and ShardedDDP hold: whole weights everywhere, optimizer state on its owner alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchweld.errors import RunError
from torchweld.interfaces import Env, ParameterShape, Prepared, Shard, ShardReader
from torchweld.model.names import named_parameters
from torchweld.strategies.optimizer_state import (
    optimizer_shards,
    restore_optimizer,
    state_bytes,
)
from torchweld.strategies.replicated import bytes_of, restore_weights, weight_shards

if TYPE_CHECKING:
    from torchweld.components import Settings


class ShardedState:
    """Checkpoint and memory of a model whose optimizer is an OSS.

    Nothing is gathered: OSS's own ``consolidate_state_dict`` brings all of the state to one rank,
    pickled, and returns tensors that the next step changes.

    Args:
        model: bare, on every rank.
        oss: over its parameters.
        env: this rank among the others.
        sent: the parameters that are views of OSS's buffers at this time.
        shards_gradients: whether a rank frees the gradients that it does not step.
    """

    def __init__(
        self,
        model: nn.Module,
        oss: Any,
        env: Env,
        *,
        sent: Callable[[], Iterable[nn.Parameter]],
        shards_gradients: bool,
    ) -> None:
        self._model, self._oss, self._env = model, oss, env
        self._sent, self._shards_gradients = sent, shards_gradients

    def bound_to(self, prepared: Prepared, notes: Sequence[str]) -> Prepared:
        """Return ``prepared`` with this in place of what the whole optimizer would have."""
        return replace(
            prepared,
            notes=notes,
            shards=self.shards,
            restore=self.restore,
            bytes_per_rank=self.bytes_per_rank,
        )

    def owned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this rank steps, under their names."""
        owned = {id(p) for group in self._oss.optim.param_groups for p in group["params"]}
        return ((n, p) for n, p in named_parameters(self._model) if id(p) in owned)

    def shards(self) -> Iterator[Shard]:
        """Weights and buffers from rank 0, optimizer state from every rank that owns some.

        Raises:
            RunError: a parameter is no longer what OSS sends.
        """
        self._check_attached()
        if self._env.rank == 0:
            yield from weight_shards(self._model)
        yield from optimizer_shards(self._oss.optim, self.owned())

    @torch.no_grad()
    def restore(self, reader: ShardReader) -> None:
        """Fill weights and buffers, and the state of what this rank owns, whoever wrote it."""
        restore_weights(self._model, reader)
        self._oss.state.clear()  # what a wrapper around OSS left for its next step
        restore_optimizer(self._oss.optim, self.owned(), reader)

    def bytes_per_rank(self) -> Mapping[str, int]:
        """Bytes held on this rank; gradients only of its own where they are sharded."""
        parameters = list(self._model.parameters())
        with_gradient = [p for _, p in self.owned()] if self._shards_gradients else parameters
        return {
            "parameters": sum(p.nbytes for p in parameters),
            "gradients": sum(p.nbytes for p in with_gradient if p.requires_grad),
            "optimizer": state_bytes(self._oss.optim),
        }

    def _check_attached(self) -> None:
        buckets = (b for by_rank in self._oss.buckets.values() for b in by_rank.values())
        storages = {bucket.buffer.untyped_storage().data_ptr() for bucket in buckets}
        lost = {id(p) for p in self._sent() if p.untyped_storage().data_ptr() not in storages}
        for name, parameter in named_parameters(self._model):
            if id(parameter) in lost:
                raise RunError(
                    f"the parameter {name!r} was given another tensor after set-up, and OSS goes "
                    "on to send the old one, so the processes drift apart: write into it with "
                    "parameter.copy_(…) instead of parameter.data = …"
                )


def largest_share(shapes: Mapping[str, ParameterShape], world_size: int, settings: Settings) -> int:
    """Bytes of the trained parameters on the rank that owns most.

    OSS gives each next tensor, whole, to the rank that has least; this is for a single group.
    """
    counts, sizes = [0] * world_size, [0] * world_size
    for one in shapes.values():
        owner = counts.index(min(counts))
        counts[owner] += math.prod(one.shape) if one.trained else 1
        sizes[owner] += bytes_of(one, settings) if one.trained else 0
    return max(sizes)

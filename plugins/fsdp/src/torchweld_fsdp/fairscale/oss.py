"""Strategy ``fairscale_oss``: torch's DDP with FairScale's sharded optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torchweld.strategies.ddp import DdpStrategy
from torchweld.strategies.replicated import estimate_replicated, place
from torchweld_fsdp.fairscale.sharding import check_wrapped, make_contiguous, shard_optimizer
from torchweld_fsdp.fairscale.state import ShardedState, largest_share

if TYPE_CHECKING:
    from torch import nn

    from torchweld.components import Settings
    from torchweld.interfaces import Env, ParameterShape, Prepared, SetupRequest


class OssStrategy:
    """One copy of the model in each process; each keeps optimizer state for its share and steps it.

    A step adds one broadcast from each rank to what DDP does.
    """

    backend: Mapping[str, str] = DdpStrategy.backend

    def __init__(self, *, find_unused_parameters: bool, bucket_cap_mb: int) -> None:
        self._ddp = DdpStrategy(
            find_unused_parameters=find_unused_parameters,
            static_graph=False,
            bucket_cap_mb=bucket_cap_mb,
        )

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        """Build it on every rank; DDP broadcasts rank 0's weights."""
        return make()

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The whole model."""
        return (model,)

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        """Shard the optimizer, then let ``ddp`` wrap the model around it."""
        model = place(model, request)
        if request.optimizer is None or not any(p.requires_grad for p in model.parameters()):
            return self._ddp.setup(model, request)
        notes = make_contiguous(model)
        oss = shard_optimizer(model, request)
        prepared = self._ddp.setup(model, replace(request, optimizer=lambda _groups: oss))
        check_wrapped(prepared.optimizer, oss)
        trained = [p for p in model.parameters() if p.requires_grad]
        state = ShardedState(model, oss, request.env, sent=lambda: trained, shards_gradients=False)
        return state.bound_to(prepared, notes)

    def estimate(
        self,
        shapes: Mapping[str, ParameterShape],
        optimizer_slots: int,
        world_size: int,
        settings: Settings,
    ) -> Mapping[str, int]:
        """As ``ddp``, with the optimizer state of the rank that has most."""
        whole = estimate_replicated(shapes, optimizer_slots, settings)
        return {**whole, "optimizer": optimizer_slots * largest_share(shapes, world_size, settings)}

    def teardown(self) -> None:
        """Nothing was taken; the process group is core's."""

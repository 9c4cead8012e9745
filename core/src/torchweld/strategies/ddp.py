"""Strategy ``ddp``: torch's DistributedDataParallel.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch.nn.parallel import DistributedDataParallel

from torchweld.strategies.replicated import (
    broadcast_weights,
    estimate_replicated,
    place,
    prepare_replicated,
)

if TYPE_CHECKING:
    from torch import nn

    from torchweld.components import Settings
    from torchweld.interfaces import Env, ParameterShape, Prepared, SetupRequest


class DdpStrategy:
    """Keeps one copy of the model in each process and averages their gradients."""

    backend: Mapping[str, str] = {"cpu": "gloo", "cuda": "nccl"}

    def __init__(
        self, *, find_unused_parameters: bool, static_graph: bool, bucket_cap_mb: int
    ) -> None:
        self.find_unused_parameters = find_unused_parameters
        self.static_graph = static_graph
        self.bucket_cap_mb = bucket_cap_mb

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        """Build it on every rank; rank 0's weights are broadcast when it is wrapped."""
        return make()

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The whole model."""
        return (model,)

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        """Wrap the model, unless it is only evaluated, and make the optimizer."""
        model = place(model, request)
        if request.optimizer is None or not any(p.requires_grad for p in model.parameters()):
            # DDP, which would do it, refuses a model with nothing to train.
            broadcast_weights(model, request.env)
            return prepare_replicated(model, request, wrapped=model, window=None)
        wrapped = self._wrap(model, request.env)

        def exchange_in_last(last: bool, _size: int) -> None:
            # What no_sync() sets; it has to be right before forward, where DDP decides.
            wrapped.require_backward_grad_sync = last

        return prepare_replicated(model, request, wrapped=wrapped, window=exchange_in_last)

    def _wrap(self, model: nn.Module, env: Env) -> DistributedDataParallel:
        return DistributedDataParallel(
            model,
            device_ids=[env.device.index] if env.device.type == "cuda" else None,
            process_group=env.group,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            bucket_cap_mb=self.bucket_cap_mb,
            gradient_as_bucket_view=True,  # saves one more copy of the gradients
        )

    def estimate(
        self,
        shapes: Mapping[str, ParameterShape],
        optimizer_slots: int,
        world_size: int,
        settings: Settings,
    ) -> Mapping[str, int]:
        """The same on every rank: the whole model, its gradients and its optimizer state.

        DDP's buckets are the gradients themselves.
        """
        return estimate_replicated(shapes, optimizer_slots, settings)

    def teardown(self) -> None:
        """Nothing was taken; the process group is core's."""

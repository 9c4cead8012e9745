"""Strategy ``fairscale_sdp``: FairScale's ShardedDDP, which shards gradients too.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", arXiv 1910.02054, stage 2; FairScale's ShardedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchweld.strategies.replicated import (
    broadcast_weights,
    estimate_replicated,
    place,
    prepare_replicated,
)
from torchweld_fsdp.fairscale.imports import fairscale_module
from torchweld_fsdp.fairscale.sharding import check_wrapped, make_contiguous, shard_optimizer
from torchweld_fsdp.fairscale.state import ShardedState, largest_share
from torchweld_fsdp.norms import clip_parts

if TYPE_CHECKING:
    from torchweld.components import Settings
    from torchweld.interfaces import Env, ParameterShape, Prepared, SetupRequest


class SdpStrategy:
    """One copy of the weights in each process; gradients go to the process that steps them."""

    backend: Mapping[str, str] = {"cpu": "gloo", "cuda": "nccl"}

    def __init__(self, *, auto_refresh_trainable: bool) -> None:
        self._auto_refresh_trainable = auto_refresh_trainable

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        """Build it on every rank; rank 0's weights are broadcast in set-up."""
        return make()

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The whole model."""
        return (model,)

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        """Shard the optimizer, then wrap the model, unless it is only evaluated."""
        model = place(model, request)
        broadcast_weights(model, request.env)
        if request.optimizer is None or not any(p.requires_grad for p in model.parameters()):
            return prepare_replicated(model, request, wrapped=model, window=None)
        notes = make_contiguous(model)
        oss = shard_optimizer(model, request)
        wrapped = self._wrap(model, oss, request.env)
        gradients = OwnedGradients(oss, wrapped, request)
        if request.grad_transforms:  # which are to see finished ones
            transforms = (lambda _named: gradients.collect(), *request.grad_transforms)
            request = replace(request, grad_transforms=transforms)
        prepared = prepare_replicated(
            model,
            replace(request, optimizer=lambda _groups: oss),
            wrapped=wrapped,
            window=_exchange_in_last(wrapped),
            gradients=gradients,
        )
        check_wrapped(prepared.optimizer, oss)
        # As of the last forward, which looks for what was frozen or unfrozen.
        state = ShardedState(
            model, oss, request.env, sent=lambda: wrapped._trainable_params, shards_gradients=True
        )
        return state.bound_to(prepared, notes)

    def _wrap(self, model: nn.Module, oss: Any, env: Env) -> Any:
        return fairscale_module("fairscale.nn.data_parallel").ShardedDataParallel(
            model,
            oss,
            process_group=env.group,
            sync_models_at_startup=False,  # done: it leaves non-persistent buffers out
            # With a buffer a gradient is never None: after zero_grad() of the optimizer the steps
            # are wrong by 0.05, and momentum moves unused and frozen weights, on one rank only.
            reduce_buffer_size=0,
            auto_refresh_trainable=self._auto_refresh_trainable,
        )

    def estimate(
        self,
        shapes: Mapping[str, ParameterShape],
        optimizer_slots: int,
        world_size: int,
        settings: Settings,
    ) -> Mapping[str, int]:
        """All weights; gradients and optimizer state of the rank that has most."""
        share = largest_share(shapes, world_size, settings)
        whole = estimate_replicated(shapes, optimizer_slots, settings)
        return {**whole, "gradients": share, "optimizer": optimizer_slots * share}

    def teardown(self) -> None:
        """Nothing was taken; the process group is core's."""


class OwnedGradients:
    """Gradients that are finished on the rank that owns the parameter, and freed on the others."""

    def __init__(self, oss: Any, wrapped: Any, request: SetupRequest) -> None:
        self._oss, self._wrapped, self._env = oss, wrapped, request.env
        self._accumulates = request.settings.accumulate_grad_batches > 1
        self._owned = [p for group in oss.optim.param_groups for p in group["params"]]

    def collect(self) -> None:
        """Reduce what the last micro-batch of a window left out.

        ShardedDDP reduces a gradient when the last backward adds to it. A layer that only earlier
        micro-batches used would be stepped by its owner with the owner's own part. A second call
        finds nothing left.
        """
        if not self._accumulates:
            return
        wrapped = self._wrapped
        for index, parameter in enumerate(wrapped._trainable_params):
            if wrapped._grad_to_be_reduced[index] and parameter.grad is not None:
                # Outside of a backward nobody calls back at its end.
                wrapped._bucket_flush_callback_set = True
                wrapped._manual_reduce[index]()
        wrapped._consume_work_handles()

    def clip_norm(self, limit: float) -> Tensor:
        """Scale to a norm of at most ``limit``; returns the norm over all ranks, from one reduce.

        ``OSS.clip_grad_norm`` remembers in its first call which parameters had a gradient then,
        and reduces over all processes instead of its group.
        """
        gradients = [p.grad for p in self._owned if p.grad is not None]
        return clip_parts(gradients, limit, self._env.group, self._env.device)

    def clip_value(self, limit: float) -> None:
        """Clamp every element of the finished gradients."""
        nn.utils.clip_grad_value_(self._owned, limit)

    def zero(self) -> None:
        """Set every gradient to None: a zero would let momentum and decay move unused weights."""
        self._oss.zero_grad(set_to_none=True)


def _exchange_in_last(wrapped: Any) -> Callable[[bool, int], None]:
    def tell(last: bool, _size: int) -> None:
        # What no_sync() sets; the hooks read it in backward, the exchange of buffers in forward.
        wrapped._should_accumulate_grads = not last

    return tell

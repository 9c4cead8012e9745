"""Strategy ``fairscale_fsdp``: FairScale's FullyShardedDataParallel, on CUDA devices.

On a CPU its first forward ends with ``KeyError: 'all_gather'``: it looks up a CUDA stream.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", arXiv 1910.02054, stage 3; FairScale's FullyShardedDataParallel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchweld.errors import RunError
from torchweld.interfaces import Prepared
from torchweld.model.parameters import frozen
from torchweld.model.precision import forward_under
from torchweld.strategies.optimizing import OptimizerStep
from torchweld.strategies.replicated import (
    WindowScale,
    broadcast_weights,
    bytes_of,
    estimate_of,
    no_step,
    place,
    set_mode,
)
from torchweld_fsdp.fairscale.imports import fairscale_module, hide_deprecations
from torchweld_fsdp.fairscale.pieces import PieceState, named_shards
from torchweld_fsdp.fairscale.sharding import check_shareable
from torchweld_fsdp.norms import clip_parts
from torchweld_fsdp.units import choose_units

if TYPE_CHECKING:
    from torchweld.components import Settings
    from torchweld.interfaces import Env, ParameterShape, SetupRequest


class FairscaleFsdpStrategy:
    """Keeps a part of each parameter, its gradient and its optimizer state in each process."""

    backend: Mapping[str, str] = {"cuda": "nccl", "cpu": "gloo"}

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        """Build it on every rank; rank 0's weights are broadcast before they are sharded."""
        return make()

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        """What is gathered one by one, as ``fsdp`` finds it; the model where there is none."""
        return [module for _, module in choose_units(model).units] or (model,)

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        """Shard the blocks, then the rest, then make the optimizer over the parts."""
        check_device(request.env)
        return prepare_sharded(model, request)

    def estimate(
        self,
        shapes: Mapping[str, ParameterShape],
        optimizer_slots: int,
        world_size: int,
        settings: Settings,
    ) -> Mapping[str, int]:
        """A part of everything, each parameter padded to a multiple of the number of ranks."""
        sizes = {
            name: bytes_of(one, settings, -(-math.prod(one.shape) // world_size))
            for name, one in shapes.items()
        }
        return estimate_of(shapes, sizes, optimizer_slots)

    def teardown(self) -> None:
        """Nothing was taken; the process group is core's."""


def check_device(env: Env) -> None:
    """Refuse what FairScale's FSDP cannot run on.

    Raises:
        RunError: a device without CUDA streams.
    """
    if env.device.type != "cuda":
        raise RunError(
            f"strategy 'fairscale_fsdp' was asked for, but this run is on {env.device.type!r}: "
            "FairScale's FSDP looks up CUDA streams in its first forward and ends there with "
            "KeyError: 'all_gather'; choose strategy='fsdp', which shards the same on any device"
        )


def prepare_sharded(model: nn.Module, request: SetupRequest) -> Prepared:
    """Shard ``model`` and bind everything.

    Raises:
        RunError: a precision or a parameter that FairScale's FSDP gets wrong.
    """
    _check(model, request)
    model = place(model, request)
    broadcast_weights(model, request.env)
    for parameter in model.parameters():
        # A part is cut out of what a contiguous tensor is in memory.
        parameter.data = parameter.data.contiguous()
    units = choose_units(model)
    root = shard_model(model, [unit for _, unit in units.units], request.env)
    return _bind(root, request, [f"sharded one by one: {units}", *units.warnings])


def _check(model: nn.Module, request: SetupRequest) -> None:
    settings = request.settings
    if settings.precision in {"16", "bf16-true"}:
        raise RunError(
            f"strategy 'fairscale_fsdp' cannot do precision={settings.precision!r}: its parameters "
            "stay fp32, and each process would scale its own gradients; choose 'bf16' or '32'"
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    other = [n for n, t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    if other:
        raise RunError(
            f"{other[0]!r} is not fp32, which FairScale's FSDP refuses in parameters and silently "
            "casts in buffers: cast the model with model.float(), or choose strategy='fsdp'"
        )
    single = [n for n, p in model.named_parameters() if p.shape == (1,)]
    if single and settings.accumulate_grad_batches > 1 and request.env.world_size > 1:
        raise RunError(
            f"the parameter {single[0]!r} has shape (1,), as its part has, and FairScale's FSDP "
            "takes one for the other when gradients accumulate: accumulate_grad_batches=1, or "
            "strategy='fsdp'"
        )


def shard_model(model: nn.Module, units: Sequence[nn.Module], env: Env) -> Any:
    """Wrap ``units`` in their places in ``model``, then the model; returns the outermost wrapper.

    Every parameter stays an object of its own (FairScale's default flattens a block into one), so
    that its name, its group and what is frozen stay as they are.
    """
    hide_deprecations()
    wrap = partial(
        fairscale_module("fairscale.nn.data_parallel").FullyShardedDataParallel,
        process_group=env.group,
        process_group_reduce_scatter=env.group,  # else a group that outlives this run
        flatten_parameters=False,
        # Kept after an evaluation, whole weights would be used again whatever was written since.
        disable_reshard_on_root=False,
        compute_device=env.device,
    )
    for unit in units:
        parents = list(model.modules())  # before it is wrapped: the wrapper is no parent to change
        wrapped = wrap(unit)
        for parent in parents:
            for name, child in parent.named_children():
                if child is unit:
                    setattr(parent, name, wrapped)
    root = wrap(model)
    _free_all_of_the_root(root)
    return root


def _free_all_of_the_root(root: Any) -> None:
    """Make parts of all parameters at the end of backward, as FairScale does below the root.

    In the root it leaves the frozen and the unused ones whole: writing to them has no effect then,
    and a gradient that an earlier micro-batch left fails an assertion.
    """
    finish = root._wait_for_post_backward

    def free_and_finish() -> None:
        root._free_full_params()
        root._use_fp32_param_shard()
        finish()

    root._wait_for_post_backward = free_and_finish  # looked up by name, in each backward


class ShardedGradients:
    """Gradients of which each rank holds its part, finished after every backward."""

    def __init__(self, root: Any, env: Env) -> None:
        self._env = env
        self._parameters = list(root.parameters())

    def collect(self) -> None:
        """Nothing: the optimizer holds the parameters themselves."""

    def clip_norm(self, limit: float) -> Tensor:
        """Scale to a norm of at most ``limit``; returns the norm over all ranks."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return clip_parts(gradients, limit, self._env.group, self._env.device)

    def clip_value(self, limit: float) -> None:
        """Clamp every element of this rank's parts."""
        nn.utils.clip_grad_value_(self._parameters, limit)

    def zero(self) -> None:
        """Set every gradient to None."""
        for parameter in self._parameters:
            parameter.grad = None


def _bind(root: Any, request: SetupRequest, notes: Sequence[str]) -> Prepared:
    env, settings = request.env, request.settings
    optimizing = None
    if request.optimizer is not None:
        optimizing = OptimizerStep(root, request, gradients=ShardedGradients(root, env))
        check_shareable(optimizing.optimizer)
    optimizer = optimizing.optimizer if optimizing else None
    # Every micro-batch is reduced: gradients stay parts, and what the last one leaves out is right.
    scale = WindowScale(None)
    state = PieceState(root, optimizer, env)
    forward = forward_under(root, settings.precision, env.device)
    return Prepared(
        forward=forward,
        evaluate=forward,
        evaluate_is_collective=True,
        mode=partial(set_mode, root, env),
        optimizer=optimizer,
        backward=scale.backward(settings, None),
        step=optimizing.bind() if optimizing else no_step,
        step_closure=optimizing.with_closure if optimizing else None,
        window=scale.open if settings.accumulate_grad_batches > 1 else None,
        grad_norm=lambda: optimizing.norm if optimizing else None,
        frozen=lambda: frozen(root.parameters()),
        named_parameters=lambda: named_shards(root),
        shards=state.shards,
        restore=state.restore,
        bytes_per_rank=state.bytes_per_rank,
        notes=notes,
    )

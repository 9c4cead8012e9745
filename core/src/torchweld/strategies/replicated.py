"""What ``single`` and ``ddp`` share: every rank holds the whole model and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchweld.interfaces import Prepared, Shard, ShardReader
from torchweld.model.names import named_parameters, persistent_buffers
from torchweld.model.parameters import check_materialised, frozen
from torchweld.model.precision import cast_dtype, forward_under
from torchweld.strategies.optimizer_state import (
    optimizer_shards,
    restore_optimizer,
    state_bytes,
    whole,
)
from torchweld.strategies.optimizing import Gradients, OptimizerStep

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from torchweld.components import Settings
    from torchweld.interfaces import Env, ParameterShape, SetupRequest


def place(model: nn.Module, request: SetupRequest) -> nn.Module:
    """Move ``model`` to its device, in the dtype that the precision asks for."""
    check_materialised(model)
    return model.to(device=request.env.device, dtype=cast_dtype(request.settings.precision))


def broadcast_weights(model: nn.Module, env: Env) -> None:
    """Give every rank rank 0's parameters and buffers; a no-op in one process without a group."""
    if env.group is None:
        return
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0, group=env.group)


def prepare_replicated(
    model: nn.Module,
    request: SetupRequest,
    *,
    wrapped: nn.Module,
    window: Callable[[bool, int], None] | None,
    gradients: Gradients | None = None,
) -> Prepared:
    """Bind everything for a ``model`` that every rank holds whole.

    Args:
        model: the bare module, on its device.
        wrapped: what is called in training; ``model`` itself where nothing wraps it.
        window: what a new accumulation window has to tell the wrapper, None for nothing.
        gradients: where a rank does not hold all of them; None: it does.
    """
    env, settings = request.env, request.settings
    optimizing = None
    if request.optimizer is not None:
        optimizing = OptimizerStep(model, request, gradients=gradients)
    optimizer = optimizing.optimizer if optimizing else None
    scale = WindowScale(window)
    return Prepared(
        forward=forward_under(wrapped, settings.precision, env.device),
        evaluate=forward_under(model, settings.precision, env.device),
        evaluate_is_collective=False,
        mode=partial(set_mode, model, env),
        optimizer=optimizer,
        backward=scale.backward(settings, optimizing.scaler if optimizing else None),
        step=optimizing.bind() if optimizing else no_step,
        step_closure=optimizing.with_closure if optimizing and not optimizing.scaler else None,
        window=scale.open if settings.accumulate_grad_batches > 1 else None,
        grad_norm=lambda: optimizing.norm if optimizing else None,
        frozen=lambda: frozen(model.parameters()),
        named_parameters=partial(named_parameters, model),
        shards=lambda: _shards(model, optimizer) if env.rank == 0 else iter(()),
        restore=lambda reader: _restore(model, optimizer, reader),
        bytes_per_rank=lambda: _bytes(model, optimizer),
        loss_scaler=optimizing.scaler if optimizing else None,
    )


class WindowScale:
    """Divides each loss by the number of micro-batches in its window."""

    def __init__(self, tell: Callable[[bool, int], None] | None) -> None:
        self._tell = tell
        self._size = 1

    def open(self, last: bool, size: int) -> None:
        """Called before forward: DDP decides there whether it will exchange gradients."""
        self._size = size
        if self._tell is not None:
            self._tell(last, size)

    def backward(self, settings: Settings, scaler: Any | None) -> Callable[[Tensor], None]:
        """Return the backward of this run; with nothing to scale it is torch's own."""
        if scaler is not None:
            return lambda loss: scaler.scale(loss / self._size).backward()
        if settings.accumulate_grad_batches > 1:
            return lambda loss: (loss / self._size).backward()
        return Tensor.backward


def estimate_replicated(
    shapes: Mapping[str, ParameterShape], optimizer_slots: int, settings: Settings
) -> dict[str, int]:
    """Bytes on each rank: all parameters; gradients and optimizer state of the trained ones."""
    sizes = {name: bytes_of(one, settings) for name, one in shapes.items()}
    return estimate_of(shapes, sizes, optimizer_slots)


def estimate_of(
    shapes: Mapping[str, ParameterShape], sizes: Mapping[str, int], optimizer_slots: int
) -> dict[str, int]:
    """Add up what a rank holds of each parameter, ``sizes`` in bytes."""
    trained = sum(sizes[name] for name, one in shapes.items() if one.trained)
    return {
        "parameters": sum(sizes.values()),
        "gradients": trained,
        "optimizer": optimizer_slots * trained,
    }


def bytes_of(one: ParameterShape, settings: Settings, numel: int | None = None) -> int:
    """Bytes of ``numel`` elements of a parameter, or of all, in the dtype of the run."""
    cast = cast_dtype(settings.precision) if one.dtype.is_floating_point else None
    count = torch.Size(one.shape).numel() if numel is None else numel
    return count * (cast or one.dtype).itemsize


def no_step() -> bool:
    """Be the ``step`` of a model without an optimizer."""
    raise RuntimeError("step() was called on a model that was prepared for evaluation only")


def set_mode(model: nn.Module, env: Env, train: bool) -> None:
    """Switch between training and evaluation, for which every rank takes rank 0's buffers."""
    model.train(train)
    if not train and env.world_size > 1:
        with torch.no_grad():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0, group=env.group)


def _bytes(model: nn.Module, optimizer: Optimizer | None) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.nbytes for p in parameters),
        "gradients": sum(p.nbytes for p in parameters if p.requires_grad),
        "optimizer": state_bytes(optimizer) if optimizer is not None else 0,
    }


def _shards(model: nn.Module, optimizer: Any | None) -> Iterator[Shard]:
    yield from weight_shards(model)
    if optimizer is not None:
        yield from optimizer_shards(optimizer, named_parameters(model))


@torch.no_grad()
def _restore(model: nn.Module, optimizer: Any | None, reader: ShardReader) -> None:
    restore_weights(model, reader)
    if optimizer is not None:
        restore_optimizer(optimizer, named_parameters(model), reader)


def weight_shards(model: nn.Module) -> Iterator[Shard]:
    """All weights and buffers, whole; of one rank."""
    for name, tensor in (*named_parameters(model), *persistent_buffers(model)):
        yield from whole(f"model/{name}", tensor, None)


@torch.no_grad()
def restore_weights(model: nn.Module, reader: ShardReader) -> None:
    """Fill all weights and buffers, on every rank."""
    for name, tensor in (*named_parameters(model), *persistent_buffers(model)):
        reader.fill(f"model/{name}", tensor, (0,) * tensor.dim())

"""The optimizer step on shards, without a Python call for each parameter.

An optimizer over DTensors goes through DTensor's dispatch for every parameter and operation: two
thirds of the Python calls of an FSDP2 step. An elementwise optimizer gives the same result, bit
for bit, over the local tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor

from torchweld.errors import InvalidArgument, RunError
from torchweld.interfaces import SetupRequest
from torchweld.model.names import named_parameters
from torchweld.strategies.optimizing import ELEMENTWISE
from torchweld_fsdp.norms import clip_parts

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Piece:
    """One parameter as this rank holds it.

    Attributes:
        name: canonical.
        parameter: the model's: a ``DTensor``, or a whole tensor that was left unsharded.
        held: what the optimizer holds: ``parameter`` itself, or its local tensor.
    """

    name: str
    parameter: nn.Parameter
    held: nn.Parameter

    @property
    def local(self) -> Tensor:
        """The values of this rank."""
        parameter = self.parameter
        return parameter._local_tensor if isinstance(parameter, DTensor) else parameter.detach()


def make_pieces(model: nn.Module, *, local: bool) -> list[Piece]:
    """Return every parameter of a sharded ``model``, each once.

    Args:
        model: resharded, uneven shards padded already.
        local: whether the optimizer is to hold local tensors.
    """
    return [
        Piece(name, parameter, _local(parameter) if local else parameter)
        for name, parameter in named_parameters(model)
    ]


def _local(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter._local_tensor.detach(), parameter.requires_grad)


def steps_locally(optimizer: Optimizer, request: SetupRequest) -> bool:
    """Whether the step of ``optimizer`` is elementwise: what wraps it may look at whole norms."""
    return type(optimizer) in ELEMENTWISE and not request.optimizer_wrappers


WHOLE = {
    "LBFGS": "lays all parameters end to end",
    "Adafactor": "keeps rows and columns of each weight's squares, which are not cut as the weight",
    "Muon": "multiplies whole matrices, and is off by 1e-3 in a step over shards",
}
"""Optimizers of torch that need more of a parameter than a shard, and why."""


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer that needs whole parameters.

    Raises:
        InvalidArgument: it is one of :data:`WHOLE`.
    """
    for name, why in WHOLE.items():
        if isinstance(optimizer, getattr(optim, name, ())):
            raise InvalidArgument(
                f"{name} {why}, so shards are not enough: use strategy 'ddp', or another optimizer"
            )


def describe_step(optimizer: Any, *, local: bool) -> list[str]:
    """Say what an optimizer that is not of torch sees, where it may take a part for the whole."""
    if local or type(optimizer) in ELEMENTWISE:
        return []
    name = type(optimizer).__name__
    seen = "what it reads with float() or .item() is that of this process alone"
    return [f"fsdp: {name} is stepped over DTensors: norms are those of the whole weight; {seen}"]


def hold(optimizer: Optimizer, pieces: Sequence[Piece]) -> None:
    """Make a fresh ``optimizer`` hold what ``pieces`` say, in place of the model's parameters.

    What it keeps for a parameter from the start, as Adagrad does, is cut to the local tensor.
    """
    held = {id(piece.parameter): piece.held for piece in pieces}
    for group in optimizer.param_groups:
        group["params"] = [held.get(id(p), p) for p in group["params"]]
    for parameter, state in list(optimizer.state.items()):
        del optimizer.state[parameter]
        optimizer.state[held.get(id(parameter), parameter)] = {
            key: value._local_tensor if isinstance(value, DTensor) else value
            for key, value in state.items()
        }


def step_together(optimizer: Optimizer) -> None:
    """Let an optimizer over DTensors take them all in one operation, where torch offers that."""
    if not isinstance(optimizer, ELEMENTWISE):
        return
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def names_held(optimizer: Any, pieces: Iterable[Piece]) -> list[list[str]]:
    """Return the names in each group; empty for a tensor that is none of the model's."""
    names = {id(piece.held): piece.name for piece in pieces}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


class ShardedGradients:
    """The gradients of this rank's shards: handed on, clipped by the full norm, freed.

    Args:
        pieces: of all parameters.
        group: the ranks that share a model; replicas hold the same norm.
    """

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup) -> None:
        self._parameters = [piece.parameter for piece in pieces]
        self._pairs = [(p.parameter, p.held) for p in pieces if p.held is not p.parameter]
        self._sharded = [p.parameter for p in pieces if isinstance(p.parameter, DTensor)]
        self._whole = [p.parameter for p in pieces if not isinstance(p.parameter, DTensor)]
        self._group = group

    def collect(self) -> None:
        """Give the optimizer's tensors their gradients; the names of attributes cost no call.

        Raises:
            RunError: there are none, so the step would do nothing.
        """
        missing = len(self._parameters)
        for parameter in self._parameters:
            missing -= parameter.grad is not None
        if missing == len(self._parameters):
            raise RunError(_NO_GRADIENT)
        for parameter, held in self._pairs:
            gradient: Any = parameter.grad
            held.grad = None if gradient is None else gradient._local_tensor

    def clip_norm(self, limit: float) -> Tensor:
        """Scale all gradients to a norm of at most ``limit``, by one ``all_reduce``.

        Returns:
            The full norm before that, a plain tensor, equal on all ranks.
        """
        device = self._parameters[0].device
        return clip_parts(self._locals(), limit, self._group, device, whole=self._wholes())

    def clip_value(self, limit: float) -> None:
        """Clamp every element to ``[-limit, limit]``."""
        gradients = self._locals() + self._wholes()
        if gradients:
            torch._foreach_clamp_min_(gradients, -limit)
            torch._foreach_clamp_max_(gradients, limit)

    def zero(self) -> None:
        """Free all gradients."""
        for parameter in self._parameters:
            parameter.grad = None
        for _, held in self._pairs:
            held.grad = None

    def _locals(self) -> list[Tensor]:
        gradients: list[Any] = [p.grad for p in self._sharded]
        return [g._local_tensor for g in gradients if g is not None]

    def _wholes(self) -> list[Tensor]:
        return [p.grad for p in self._whole if p.grad is not None]


_NO_GRADIENT = (
    "backward reached no parameter, so the step would change nothing: FSDP2 looks for tensors in "
    "the model's outputs and does not see those in objects of a class of its own, nor one that is "
    "changed in place; return tensors, tuples or mappings, and change copies"
)


def check_bound(pieces: Sequence[Piece]) -> None:
    """Check that the optimizer still holds the memory of the model's shards.

    Raises:
        RunError: somebody replaced a shard, so the optimizer would train a copy of it.
    """
    for piece in pieces:
        if piece.held is not piece.parameter and piece.local.data_ptr() != piece.held.data_ptr():
            raise RunError(
                f"the shard of {piece.name!r} was replaced after set-up (load_state_dict with "
                "assign=True does that), so the optimizer would train a copy of it: copy values "
                "into the parameter, or load them with init_weights="
            )


def average_whole(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup
) -> Callable[[], None]:
    """Return what averages the gradients of parameters that every rank keeps whole.

    FSDP2 leaves the gradients of ignored parameters to each rank, and the ranks drift apart. What
    is frozen, or has no gradient on any rank, keeps none: momentum and decay would move it.
    """
    size = group.size()

    def average() -> None:
        trained = [p for p in parameters if p.requires_grad]
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in trained:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for alike in by_dtype.values():
            _average(alike, group, size)

    return average


def _average(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, size: int) -> None:
    """Average gradients of one dtype in one ``all_reduce``; how many ranks have one goes along."""
    there = [parameter.grad is not None for parameter in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    counts = torch.tensor(there, dtype=gradients[0].dtype, device=gradients[0].device)
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), counts])
    dist.all_reduce(flat, group=group)
    pieces = flat.split([*(gradient.numel() for gradient in gradients), len(counts)])
    # Only a rank that lacks a gradient has to know whether the others do.
    anywhere = there if all(there) else pieces[-1].bool().tolist()
    for parameter, piece, exists in zip(parameters, pieces, anywhere, strict=False):
        parameter.grad = piece.div_(size).view_as(parameter) if exists else None


def bytes_held(pieces: Iterable[Piece], state: Mapping[Any, Mapping[str, Any]]) -> dict[str, int]:
    """Count the bytes of this rank: shards with their padding, gradients, optimizer state."""
    sizes = {piece.name: piece.local.untyped_storage().nbytes() for piece in pieces}
    trained = [piece.name for piece in pieces if piece.parameter.requires_grad]
    tensors = [v for values in state.values() for v in values.values() if isinstance(v, Tensor)]
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    return {
        "parameters": sum(sizes.values()),
        "gradients": sum(sizes[name] for name in trained),
        "optimizer": sum(tensor.nbytes for tensor in local),
    }

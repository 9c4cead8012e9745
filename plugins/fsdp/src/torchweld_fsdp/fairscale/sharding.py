"""OSS around the user's optimizer, made so that what happens outside of it has an effect.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", arXiv 1910.02054, stage 1; FairScale's OSS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import LBFGS, Optimizer

from torchweld.errors import InvalidArgument, RunError
from torchweld.model.names import canonical
from torchweld.strategies.optimizing import plain_groups
from torchweld_fsdp.fairscale.imports import fairscale_module

if TYPE_CHECKING:
    from torch import nn

    from torchweld.interfaces import ParamGroup, SetupRequest


def shard_optimizer(model: nn.Module, request: SetupRequest) -> Any:
    """Return an OSS that steps this rank's share of the parameters; ``model`` is on its device.

    The parameters become views of flat buffers, one for each rank that owns some.

    Raises:
        InvalidArgument: an optimizer whose step cannot be shared out.
        RunError: parameters that cannot lie in one buffer.
    """
    assert request.optimizer is not None
    check_one_dtype(model)
    oss = fairscale_module("fairscale.optim").OSS(
        plain_groups(request), optim=request.optimizer, group=request.env.group
    )
    _check_inner(oss.optim, oss.partition_parameters()[oss.rank])
    # A schedule looks here for the hyper-parameters that it may change: OneCycleLR for betas or
    # momentum. FairScale has them in its inner optimizer only, where a schedule has no effect.
    oss.defaults = dict(oss.optim.defaults)
    return oss


def make_contiguous(model: nn.Module) -> list[str]:
    """Lay the weights out as OSS will, before DDP plans its buckets; returns a note of it."""
    strided = [(n, p) for n, p in model.named_parameters() if not p.is_contiguous()]
    for _, parameter in strided:
        parameter.data = parameter.data.contiguous()
    if not strided:
        return []
    first = canonical(strided[0][0])
    said = f"{len(strided)} parameters ({first}, …) were made contiguous: "
    return [said + "OSS keeps them in flat buffers"]


def check_wrapped(optimizer: Any, oss: Any) -> None:
    """Refuse a wrapper whose state would be on every rank and in no checkpoint.

    Raises:
        InvalidArgument: it keeps state of its own.
    """
    if optimizer is not oss and optimizer.state is not oss.state:
        raise InvalidArgument(
            f"the optimizer wrapper {type(optimizer).__name__} keeps a state of its own, which "
            "FairScale's OSS neither shards nor saves: choose strategy 'ddp' or 'fsdp'"
        )


def check_one_dtype(model: nn.Module) -> None:
    """Check that what is trained fits into flat buffers.

    Raises:
        RunError: names two parameters of different dtypes.
    """
    by_dtype = {p.dtype: n for n, p in model.named_parameters() if p.requires_grad}
    if len(by_dtype) > 1:
        named = ", ".join(f"{canonical(n)!r} is {d}" for d, n in by_dtype.items())
        raise RunError(
            f"FairScale's OSS keeps the trained parameters in flat buffers of one dtype, and "
            f"{named}: cast the model to one, or choose strategy 'ddp'"
        )


def check_shareable(optimizer: Any) -> None:
    """Refuse an optimizer whose step needs all parameters at once.

    Raises:
        InvalidArgument: LBFGS, or one that says ``needs_closure``.
    """
    if isinstance(optimizer, LBFGS) or getattr(optimizer, "needs_closure", False):
        raise InvalidArgument(
            f"{type(optimizer).__name__} evaluates the loss between moves of all parameters, and "
            "with FairScale each process moves its own share only: choose strategy 'ddp', or "
            "another optimizer"
        )


def _check_inner(inner: Optimizer, share: list[ParamGroup]) -> None:
    check_shareable(inner)
    name = type(inner).__name__
    if _members(inner.param_groups) != _members(share):
        raise InvalidArgument(
            f"{name} was made of {len(share)} parameter groups and has {len(inner.param_groups)}, "
            "or others: FairScale's OSS hands learning rates on by place, so make it of the "
            "groups it is given, e.g. optimizer=functools.partial(torch.optim.SGD, lr=0.1)"
        )


def _members(groups: list[ParamGroup]) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in groups]

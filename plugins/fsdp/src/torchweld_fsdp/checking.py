"""What of a model and of the options FSDP2 cannot do, said before anything is sharded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torchweld.errors import InvalidArgument
from torchweld.interfaces import Env
from torchweld.model.names import canonical
from torchweld.model.parameters import check_materialised
from torchweld.spelling import did_you_mean


def check_model(model: nn.Module, env: Env, methods: Sequence[str]) -> None:
    """Refuse layers that cannot be sharded or cannot run here, and methods that are not there.

    Raises:
        InvalidArgument: names the layer or the method.
    """
    for method in methods:
        if not callable(getattr(model, method, None)):
            raise InvalidArgument(
                f"fsdp: forward_methods names {method!r}, and {type(model).__name__} has no such "
                "method"
            )
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise InvalidArgument(
                f"fsdp: {name or 'the model'!r} is sharded already, by hand or by a run with other "
                "options: give the model as it is (or a function that makes it), and name the "
                "units with wrap=…"
            )
        _check_layer(name, module)
        if isinstance(module, nn.SyncBatchNorm) and env.device.type == "cpu":
            raise InvalidArgument(
                f"{name!r} is a SyncBatchNorm, which needs GPUs, and this run is on the CPU: use "
                "GroupNorm, or BatchNorm, which takes the statistics of each process's batch"
            )


def _check_layer(name: str, module: nn.Module) -> None:
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return
    if module.sparse:
        raise InvalidArgument(
            f"fsdp: {name!r} has sparse gradients, which are not cut into rows: use sparse=False"
        )
    if module.max_norm is not None:
        raise InvalidArgument(
            f"fsdp: {name!r} with max_norm={module.max_norm} rescales its weights in forward, "
            "which is lost when they are cut again: leave max_norm out, or keep the weight whole: "
            f"ignored=({name + '.weight'!r},)"
        )


def find_ignored(model: nn.Module, asked: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters whose names are, or end with, one of those ``asked`` for.

    Raises:
        InvalidArgument: one of them fits nothing.
    """
    # A tied weight may be asked for by any of its names, and goes by the first.
    aliases = [(canonical(n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    first = {id(p): canonical(n) for n, p in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for ending in asked:
        fits = {first[id(p)]: p for name, p in aliases if is_ignored(name, (ending,))}
        if not fits:
            raise InvalidArgument(
                f"fsdp: ignored names {ending!r}, and no parameter is called so or ends with it"
                f"{_meant(ending, [name for name, _ in aliases])}"
            )
        found.update(fits)
    return found


def is_ignored(name: str, asked: Sequence[str]) -> bool:
    """Whether ``name`` is, or ends with, one of those ``asked`` for."""
    return any(name == ending or name.endswith(f".{ending}") for ending in asked)


def _meant(name: str, names: Iterable[str]) -> str:
    meant = did_you_mean(name, names)
    return f"; {meant}" if meant else ""


def check_parameters(model: nn.Module, ignored: Iterable[nn.Parameter]) -> None:
    """Refuse parameters that FSDP2 cannot cut.

    Raises:
        InvalidArgument: scalars, lazy ones, some with hooks, or several dtypes; names them.
    """
    whole = {id(parameter) for parameter in ignored}
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            check_materialised(model)
        if id(parameter) in whole:
            continue
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise InvalidArgument(
                f"fsdp: {canonical(name)!r} has hooks, and sharding replaces the parameter: "
                "register them on those of run.model.named_parameters()"
            )
        if not parameter.dim():
            raise InvalidArgument(
                f"fsdp: {canonical(name)!r} is a scalar, which cannot be cut into rows: give it "
                f"the shape (1,), or keep it whole on every process: ignored=({canonical(name)!r},)"
            )
        dtypes.setdefault(parameter.dtype, canonical(name))
    if len(dtypes) > 1:
        (one, first), (other, second), *_ = dtypes.items()
        raise InvalidArgument(
            f"fsdp: {first!r} is {one} and {second!r} is {other}: parameters are gathered "
            f"together, so give them one dtype, or keep some whole: ignored=({second!r},)"
        )


def check_reshard(reshard: bool | int, size: int) -> None:
    """Refuse a number of ranks that does not divide those of a shard group.

    Raises:
        InvalidArgument: says which numbers do.
    """
    if isinstance(reshard, bool) or (reshard > 1 and size % reshard == 0):
        return
    raise InvalidArgument(
        f"fsdp: reshard_after_forward={reshard} does not divide the {size} processes that share a "
        "model into groups: give True, False or a divisor above 1"
    )

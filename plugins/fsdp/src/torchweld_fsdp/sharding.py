"""Shard a model in place with FSDP2: inner units first, the root last, the rest checked.

Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from torchweld.components import Settings
from torchweld.errors import InvalidArgument, RunError
from torchweld.interfaces import Env
from torchweld.model.names import canonical
from torchweld.model.parameters import check_materialised
from torchweld.spelling import did_you_mean
from torchweld_fsdp.averaging import check_replicas_average, repair_averages
from torchweld_fsdp.options import FsdpOptions
from torchweld_fsdp.placing import Placer, ValueOf
from torchweld_fsdp.units import Units, choose_units

DTYPES: Mapping[str | None, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sharded:
    """A model whose parameters are shards.

    Attributes:
        model: the root, an ``FSDPModule``.
        mesh: of shape ``(shard,)``, or ``(replicate, shard)``.
        ignored: ids of the parameters that every rank keeps whole.
        notes: what was chosen and repaired.
    """

    model: nn.Module
    mesh: DeviceMesh
    ignored: frozenset[int]
    notes: tuple[str, ...]

    def modules(self) -> Iterator[FSDPModule]:
        """Every sharded module, the root among them."""
        return (module for module in self.model.modules() if isinstance(module, FSDPModule))

    def reshard(self) -> None:
        """Free what a forward without backward left gathered; parameters are shards again.

        Raises:
            RunError: one is not, because its module was replaced after the model was sharded.
        """
        for module in self.modules():
            module.reshard()
        for name, parameter in self.model.named_parameters():
            if not isinstance(parameter, DTensor) and id(parameter) not in self.ignored:
                raise RunError(
                    f"{canonical(name)!r} is no shard: its module was put in after the model was "
                    "sharded, so each process would train it alone; change the model before"
                )


def make_mesh(env: Env, replicate: int) -> DeviceMesh:
    """Return the mesh of this run's ranks.

    Raises:
        InvalidArgument: ``replicate`` does not divide the ranks.
        RunError: the back end cannot average over replicas.
    """
    if replicate < 1 or env.world_size % replicate:
        raise InvalidArgument(
            f"fsdp: replicate={replicate} does not divide the {env.world_size} processes of this "
            "run: choose a divisor, or 1 to shard over all of them"
        )
    kind = env.device.type
    assert env.group is not None  # made by core, as this strategy has a back end
    if replicate == 1:
        return DeviceMesh.from_group(env.group, kind, mesh_dim_names=("shard",))
    shape = replicate, env.world_size // replicate
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    check_replicas_average(mesh["replicate"].get_group(), env.device)
    return mesh


def shard_model(
    model: nn.Module, env: Env, settings: Settings, options: FsdpOptions, *, value_of: ValueOf
) -> Sharded:
    """Shard ``model`` in place; every rank must call it.

    Args:
        model: on the CPU or on the meta device; all ranks take rank 0's values.
        env: ranks, device and process group.
        settings: of the run.
        options: of the strategy.
        value_of: gives a tensor on the meta device its values; called on rank 0 alone.

    Raises:
        InvalidArgument: something that FSDP2 cannot do, or an option that fits nothing.
        RunError: the back end cannot.
    """
    check_model(model, env, options.forward_methods)
    ignored = find_ignored(model, options.ignored)
    check_parameters(model, ignored.values())
    mesh = make_mesh(env, options.replicate)
    check_reshard(options.reshard_after_forward, mesh["shard"].size())
    units = choose_units(model, options.wrap)
    found = f"units: {units}"  # FSDP2 gives their classes other names
    dtype = torch.bfloat16 if settings.precision == "bf16-true" else None
    placer = Placer(model, env, dtype=dtype, value_of=value_of)
    tied = _shared_names(model)
    _shard_bottom_up(model, units, placer, mesh, options, ignored)
    check_materialised(model)
    _check_tied(model, tied)
    for method in options.forward_methods:
        register_fsdp_forward_method(model, method)
    # Trainable tensors may have been replaced, so the ignored ones are looked up again.
    kept = {id(p) for n, p in model.named_parameters() if canonical(n) in ignored}
    sharded = Sharded(model, mesh, frozenset(kept), ())
    _settle_shards(sharded)
    reduce_dtype = next((p.dtype for p in model.parameters()), torch.float32)
    repairs = repair_averages(
        sharded.modules(), mesh["shard"].get_group(), env.device, reduce_dtype
    )
    return Sharded(
        model,
        mesh,
        frozenset(kept),
        (*_describe([found, *units.warnings], mesh, placer, ignored), *repairs),
    )


def _shard_bottom_up(
    model: nn.Module,
    units: Units,
    placer: Placer,
    mesh: DeviceMesh,
    options: FsdpOptions,
    ignored: Mapping[str, nn.Parameter],
) -> None:
    shard = partial(fully_shard, mesh=mesh, **_policies(options))
    # A root that reshards after forward would only gather again at once, so that is left to torch.
    after = {"reshard_after_forward": options.reshard_after_forward}
    for _, module in units.units:
        placer.settle(module.parameters())
        shard(module, **after, **_ignoring(model, ignored))
    placer.settle(p for p in model.parameters() if not isinstance(p, DTensor))
    placer.settle(model.buffers())
    shard(model, **_ignoring(model, ignored))


def _policies(options: FsdpOptions) -> dict[str, Any]:
    policies: dict[str, Any] = {}
    if options.param_dtype is not None:
        # Sums of many ranks' gradients lose digits in 16 bits.
        policies["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=DTYPES[options.param_dtype], reduce_dtype=torch.float32
        )
    if options.cpu_offload:
        policies["offload_policy"] = CPUOffloadPolicy()
    return policies


def _ignoring(model: nn.Module, ignored: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    if not ignored:
        return {}  # fully_shard of torch 2.6 has no such argument
    return {"ignored_params": {p for n, p in model.named_parameters() if canonical(n) in ignored}}


def _settle_shards(sharded: Sharded) -> None:
    """Let FSDP2 pad uneven shards now, so that what is bound to them from here on stays theirs.

    torch 2.7 makes every uneven shard anew in the first forward; an optimizer over the old ones
    would train nothing, silently.
    """
    for module in sharded.modules():
        module.unshard()
        module.reshard()


# ---- checks --------------------------------------------------------------------------------------


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
                f"fsdp: {name or 'the model'!r} is sharded already: give the model as it is, and "
                "name the units with wrap=…"
            )
        if isinstance(module, nn.SyncBatchNorm) and env.device.type == "cpu":
            raise InvalidArgument(
                f"{name!r} is a SyncBatchNorm, which needs GPUs, and this run is on the CPU: use "
                "GroupNorm, or BatchNorm, which takes the statistics of each process's batch"
            )


def find_ignored(model: nn.Module, asked: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters whose names are, or end with, one of those ``asked`` for.

    Raises:
        InvalidArgument: one of them fits nothing.
    """
    named = {canonical(name): parameter for name, parameter in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for ending in asked:
        fits = {name: p for name, p in named.items() if is_ignored(name, (ending,))}
        if not fits:
            raise InvalidArgument(
                f"fsdp: ignored names {ending!r}, and no parameter is called so or ends with it"
                f"{_meant(ending, named)}"
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
        InvalidArgument: scalars, lazy ones, or several dtypes; names them.
    """
    whole = {id(parameter) for parameter in ignored}
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            check_materialised(model)
        if id(parameter) in whole:
            continue
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
    if isinstance(reshard, bool) or (reshard >= 1 and size % reshard == 0):
        return
    raise InvalidArgument(
        f"fsdp: reshard_after_forward={reshard} does not divide the {size} processes that share a "
        "model: give True, False or a divisor"
    )


def _shared_names(model: nn.Module) -> list[tuple[str, ...]]:
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return [tuple(names) for names in by_id.values() if len(names) > 1]


def _check_tied(model: nn.Module, tied: Sequence[tuple[str, ...]]) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    for names in tied:
        if len({id(named[name]) for name in names}) > 1:
            raise RunError(
                f"fsdp: {' and '.join(map(repr, names))} were one weight and are several after "
                "sharding: keep their modules in one unit with wrap=…"
            )


def _describe(
    notes: list[str], mesh: DeviceMesh, placer: Placer, ignored: Mapping[str, nn.Parameter]
) -> list[str]:
    if mesh.ndim > 1:
        notes.append(f"{mesh.size(0)} replicas of {mesh.size(1)} shards")
    if placer.restrided:
        notes.append(
            f"{placer.restrided} weights in another memory format were made contiguous, as FSDP2 "
            "keeps no strides; inputs and activations may stay channels-last"
        )
    if ignored:
        notes.append(f"whole on every process: {', '.join(ignored)}")
    return [f"fsdp: {note}" for note in notes]

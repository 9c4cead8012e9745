"""Shard a model in place with FSDP2: inner units first, the root last, the rest checked.

Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from torchweld_fsdp.averaging import check_replicas_average, repair_averages
from torchweld_fsdp.checking import (
    check_model,
    check_parameters,
    check_reshard,
    find_ignored,
)
from torchweld_fsdp.options import FsdpOptions, as_names
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
        made_for: options and precision, which a later run must share to use it again.
    """

    model: nn.Module
    mesh: DeviceMesh
    ignored: frozenset[int]
    notes: tuple[str, ...]
    made_for: tuple[FsdpOptions, str]

    def serves(self, env: Env, options: FsdpOptions, precision: str) -> bool:
        """Whether a run with these may go on with the shards of an earlier one."""
        same_group = self.mesh.ndim > 1 or self.mesh.get_group() is env.group
        return same_group and self.made_for == (options, precision)

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
    earlier = getattr(model, _MARK, None)
    if isinstance(earlier, Sharded) and earlier.serves(env, options, settings.precision):
        return replace(earlier, notes=("fsdp: the model is in the shards of an earlier run",))
    check_model(model, env, as_names(options.forward_methods))
    ignored = find_ignored(model, as_names(options.ignored))
    check_parameters(model, ignored.values())
    mesh = make_mesh(env, options.replicate)
    check_reshard(options.reshard_after_forward, mesh["shard"].size())
    units = choose_units(model, options.wrap)
    chosen = [f"units: {units}", *units.warnings]  # FSDP2 gives the classes other names
    dtype = torch.bfloat16 if settings.precision == "bf16-true" else None
    placer = Placer(model, env, dtype=dtype, value_of=value_of)
    _shard_bottom_up(model, units, placer, mesh, options, ignored)
    notes = _describe(chosen, mesh, placer, ignored)
    # Tensors may have been replaced, so the ignored ones are looked up again.
    kept = frozenset(id(p) for n, p in model.named_parameters() if canonical(n) in ignored)
    made_for = options, settings.precision
    sharded = Sharded(model, mesh, kept, tuple(notes), made_for)
    repairs = _settle(sharded, env.device, options)
    sharded = replace(sharded, notes=(*notes, *repairs))
    setattr(model, _MARK, sharded)
    return sharded


_MARK = "_torchweld_fsdp_sharded"
"""Where a model that is evaluated and then trained says that its shards are there already."""


def _settle(sharded: Sharded, device: torch.device, options: FsdpOptions) -> list[str]:
    """Pad uneven shards for good, and repair what the back end does to averages."""
    for module in sharded.modules():
        # torch 2.7 makes every uneven shard anew in the first forward; an optimizer over the old
        # ones would train nothing, silently.
        module.unshard()
        module.reshard()
    dtypes = [p.dtype for p in sharded.model.parameters() if isinstance(p, DTensor)]
    reduced = torch.float32 if options.param_dtype is not None or not dtypes else dtypes[0]
    group = sharded.mesh["shard"].get_group()
    repairs = repair_averages(sharded.modules(), group, device, reduced)
    return [f"fsdp: {repair}" for repair in repairs]


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
    tied = _shared_names(model)
    for _, module in units.units:
        placer.settle(p for p in module.parameters() if not isinstance(p, DTensor))
        shard(module, **after, **_ignoring(model, ignored))
    placer.settle(p for p in model.parameters() if not isinstance(p, DTensor))
    placer.settle(model.buffers())
    shard(model, **_ignoring(model, ignored))
    check_materialised(model)
    _check_tied(model, tied)
    for method in as_names(options.forward_methods):
        register_fsdp_forward_method(model, method)


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

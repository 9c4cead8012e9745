"""The components ``fairscale_oss``, ``fairscale_sdp`` and ``fairscale_fsdp``: claims and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchweld import Adapt, Claims, Component, Rel, Settings

NEEDS = ("fairscale==0.4.13",)
"""Exactly this one: it is frozen, and a few of its private names are used (each has a test)."""

_FLAT = (
    "FairScale's OSS makes every parameter a view of a flat buffer, in the order of its dimensions"
)
_CASTS = (
    "precision='bf16-true' casts every parameter and buffer; precision='bf16' keeps them in fp32"
)
_BUFFERS = (
    "each process normalises BatchNorm with its own batch; buffers are rank 0's",
    "that is the definition of data-parallel training; SyncBatchNorm needs GPUs",
)
_NO_FP16 = Rel(
    "precision.fp16",
    "loss scaling looks at the gradients of one process, which then skips a step alone",
    "precision='bf16', or strategy='fairscale_oss'",
)
_FROZEN_SOFTWARE = (
    "FairScale 0.4.13, the last one, is used as it is",
    "it has not been developed since 2022; strategy='fsdp' shards more and is maintained by torch",
)
_CLOSURES = (
    "an optimizer that evaluates the loss itself (LBFGS) is refused at fit",
    "each process moves its own share alone, so the others would evaluate half-moved weights",
)


@dataclass(frozen=True)
class OssOptions:
    """Options of the DistributedDataParallel around the model, with torch's names and defaults.

    FairScale's ``broadcast_fp16`` is left out: it rounds the weights themselves to fp16 each step.
    """

    find_unused_parameters: bool = False  # look for parameters without gradient in every step
    bucket_cap_mb: int = 25  # MiB of gradients exchanged at once, > 0


@dataclass(frozen=True)
class SdpOptions:
    """Options of FairScale's ShardedDDP, with its defaults.

    ``reduce_buffer_size`` is 0 instead of 8 Mi elements, and gradients are set to None, always:
    with anything else the steps are wrong without a word.
    """

    auto_refresh_trainable: bool = True  # look in every forward for what became trainable


def oss_claims(options: OssOptions, settings: Settings) -> Claims:
    """As ``ddp``, but for the strides of weights."""
    unused = {"find_unused_parameters": True}
    why = (
        "DDP waits for the gradient of every parameter unless find_unused_parameters=True, which "
        "looks through the graph in every step"
    )
    provides = ["params.deepcopy", "grads.elementwise", "grads.whole"]
    lacks = {
        "params.may_unfreeze": "DDP exchanges the gradients and OSS the weights of what was "
        "trainable when they were made; one that becomes trainable later would drift apart"
    }
    if options.find_unused_parameters:
        provides += ["params.may_freeze", "graph.per_rank"]
    return _claims(
        settings,
        provides,
        lacks,
        adapts=(
            Adapt(unused, why + ", and processes may skip different layers", when="graph.random"),
            Adapt(unused, why + ", and some get frozen on the way", when="params.freeze_midrun"),
        ),
    )


def sdp_claims(options: SdpOptions, settings: Settings) -> Claims:
    """What stays possible where each process has the gradients of its share only."""
    owners = "ShardedDDP frees a gradient on every process but the one that steps its parameter"
    provides = ["params.deepcopy", "params.may_freeze", "grads.stepped", "grads.stepped_whole"]
    lacks = {
        "grads.elementwise": owners,
        "grads.whole": owners,
        "graph.per_rank": "ShardedDDP reduces gradients one by one as they come, so a layer that "
        "one process leaves out meets the next layer of another, and gloo ends the process",
    }
    if options.auto_refresh_trainable:
        provides.append("params.may_unfreeze")
    else:
        lacks["params.may_unfreeze"] = (
            "with auto_refresh_trainable=False nobody exchanges what becomes trainable later, and "
            "it would drift apart between processes"
        )
    return _claims(settings, provides, lacks, forbids=_NO_FP16)


def _buffers(settings: Settings) -> tuple[tuple[str, str], ...]:
    return () if settings.sync_batchnorm else (_BUFFERS,)


def _claims(
    settings: Settings,
    provides: list[str],
    lacks: Mapping[str, str],
    *,
    forbids: Rel | tuple[Rel, ...] = (),
    adapts: Adapt | tuple[Adapt, ...] = (),
) -> Claims:
    cast = settings.precision == "bf16-true"
    kept = ("precision.uniform" if cast else "precision.autocast",)
    return Claims(
        provides=("params.local", "params.writable", "step.closure", *provides, *kept),
        lacks={
            **lacks,
            "params.strided": _FLAT,
            **({"precision.autocast": _CASTS} if cast else {}),
        },
        forbids=forbids,
        adapts=adapts,
        settles=(*_buffers(settings), _CLOSURES, _FROZEN_SOFTWARE),
    )


def fairscale_fsdp_claims(_options: None, settings: Settings) -> Claims:
    """What stays possible where each process has a flat part of every parameter."""
    return Claims(
        provides=(
            "params.local",
            "params.writable",
            "params.may_freeze",
            "params.may_unfreeze",
            "grads.elementwise",
            "step.closure",
            "precision.autocast",
        ),
        lacks={
            "params.strided": "FairScale's FSDP cuts each parameter in the order of its dimensions",
            "params.deepcopy": "FairScale's FSDP holds a process group, which cannot be copied",
            "grads.whole": "each process holds a flat part of every gradient",
            "graph.per_rank": "a layer that one process leaves out is never gathered by the others",
        },
        requires=Rel(
            "device.cuda",
            "FairScale's FSDP looks up CUDA streams in its first forward and ends there with "
            "KeyError: 'all_gather'",
            "strategy='fsdp', which shards the same on any device",
        ),
        forbids=_NO_FP16,
        settles=(*_buffers(settings), _CLOSURES, _FROZEN_SOFTWARE),
    )


FAIRSCALE_OSS = Component(
    name="fairscale_oss",
    summary="DDP with FairScale's OSS: optimizer state sharded (frozen software)",
    build="torchweld_fsdp.fairscale.oss:OssStrategy",
    options=OssOptions,
    claims=oss_claims,
    needs=NEEDS,
)
FAIRSCALE_SDP = Component(
    name="fairscale_sdp",
    summary="FairScale's ShardedDDP: gradients and optimizer state sharded (frozen software)",
    build="torchweld_fsdp.fairscale.sdp:SdpStrategy",
    options=SdpOptions,
    claims=sdp_claims,
    needs=NEEDS,
)
FAIRSCALE_FSDP = Component(
    name="fairscale_fsdp",
    summary="FairScale's FSDP, on CUDA: parameters sharded too (frozen software)",
    build="torchweld_fsdp.fairscale.fully_sharded:FairscaleFsdpStrategy",
    claims=fairscale_fsdp_claims,
    needs=NEEDS,
)

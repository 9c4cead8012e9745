"""The component ``fsdp``: what it claims, and why."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from torchweld import Adapt, Claims, Component, Rel, Settings
from torchweld_fsdp.options import FsdpOptions

LACKS = {
    "params.strided": "it lays each shard out anew",
    "params.deepcopy": "FSDP2 refuses to be deep-copied; an average can read each rank's shards",
    "grads.whole": "each process holds the rows of a gradient that belong to its shard",
    "graph.per_rank": "a layer that one process leaves out is never gathered by the others, and "
    "gloo aborts them",
}

CASTS = {
    "bf16-true": "precision='bf16-true' casts every parameter and buffer; precision='bf16' keeps "
    "them in fp32",
    "param_dtype": "param_dtype casts parameters while buffers keep fp32; leave it out, and "
    "precision='bf16' computes in bf16 over fp32 weights",
}


def fsdp_claims(options: FsdpOptions, settings: Settings) -> Claims:
    """What stays possible with these options under these settings."""
    provides = [
        "params.local",
        "params.writable",
        "params.may_freeze",
        "params.may_unfreeze",
        "grads.elementwise",
        "step.closure",
    ]
    lacks, requires, forbids = dict(LACKS), [], []
    if Version(version("torch")) < Version("2.7"):
        requires.append(OLD_TORCH)
    if options.param_dtype is not None:
        lacks["precision.autocast"] = CASTS["param_dtype"]
        requires.append(_computes_in(options.param_dtype))
        forbids.append(_NO_BATCHNORM)
        if options.param_dtype == "bf16":
            forbids.append(_NOT_FP16)
    elif settings.precision == "bf16-true":
        lacks["precision.autocast"] = CASTS["bf16-true"]
        provides.append("precision.uniform")
    else:
        provides.append("precision.autocast")
    if options.cpu_offload:
        requires.append(_CUDA)
    keeps_copies = settings.precision in {"bf16", "16"} and options.param_dtype is None
    return Claims(
        provides=provides,
        lacks=lacks,
        requires=tuple(requires),
        forbids=tuple(forbids),
        adapts=_WHOLE_FIRST,
        settles=(
            *_SETTLES,
            _SAME_BUFFERS if settings.sync_batchnorm else _OWN_STATISTICS,
            *([_COPIES] if keeps_copies else []),
        ),
    )


def _computes_in(dtype: str) -> Rel:
    precision = {"bf16": "bf16", "fp16": "16"}[dtype]
    return Rel(
        "precision.fp16" if dtype == "fp16" else "precision.reduced",
        f"parameters that are gathered in {dtype} are computed with in {dtype}",
        f"say so with precision={precision!r}, or leave param_dtype out",
    )


_NO_BATCHNORM = Rel(
    "model.batchnorm",
    "BatchNorm's statistics stay fp32 while its weights are gathered in another dtype",
    "leave param_dtype out: precision='bf16' computes in bf16 over fp32 weights",
)
_NOT_FP16 = Rel(
    "precision.fp16",
    "parameters that are gathered in bf16 are computed with in bf16",
    "say so with precision='bf16', or gather in fp16: param_dtype='fp16'",
)
_CUDA = Rel(
    "device.cuda",
    "cpu_offload moves shards to host memory and back, and on the CPU they are there already",
    "leave cpu_offload out",
)
OLD_TORCH = Rel(
    "device.cuda",
    "FSDP2 of torch 2.6 has no streams for the CPU and ends in its first gather there",
    "install torch 2.7 or newer, or choose strategy='ddp'",
)
_WHOLE_FIRST = Adapt(
    {"deferred_init": False},
    "a model given as a function is built whole, as a surgery copies weights into new layers",
    when="weights.replaced",
)
_COPIES = (
    "each process keeps a 16-bit copy of every weight from forward to backward",
    "autocast makes it; param_dtype gathers in 16 bits instead, and frees it with the unit",
)
_SETTLES = (
    (
        "rank 0's weights and buffers are everybody's",
        "FSDP2 would cut one model out of pieces of differently built ones",
    ),
    (
        "gradients are averaged, whatever the back end makes of it",
        "gloo of torch 2.7 sums where an average is asked for; set-up tries it out",
    ),
    (
        "weights that two layers share stay shared",
        "FSDP2 of torch 2.7 parts them when they lie in two units",
    ),
)
_OWN_STATISTICS = (
    "BatchNorm sees each process's own batch; evaluation and checkpoints take rank 0's buffers",
    "FSDP2 never exchanges them, so each process would evaluate another model",
)
_SAME_BUFFERS = (
    "evaluation and checkpoints take rank 0's buffers",
    "FSDP2 never exchanges them, so each process would evaluate another model",
)

FSDP = Component(
    name="fsdp",
    summary="torch's FSDP2: parameters, gradients and optimizer sharded",
    build="torchweld_fsdp.strategy:FsdpStrategy",
    options=FsdpOptions,
    claims=fsdp_claims,
)

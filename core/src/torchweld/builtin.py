"""The components that core itself offers, through the same hooks as everybody else's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchweld.claims import Adapt, Claims, Rel
from torchweld.components import Component, Settings
from torchweld.hookspecs import hookimpl

_ALWAYS = (
    "params.local",
    "params.deepcopy",
    "params.strided",
    "params.writable",
    "grads.elementwise",
    "grads.whole",
    "step.closure",
)


def _precision_tokens(settings: Settings) -> tuple[str, ...]:
    return ("precision.uniform" if settings.precision == "bf16-true" else "precision.autocast",)


_CASTS = {
    "precision.autocast": "precision='bf16-true' casts every parameter and buffer; "
    "precision='bf16' keeps them in fp32"
}


def _single_claims(_options: Any, settings: Settings) -> Claims:
    return Claims(
        provides=(
            *_ALWAYS,
            "params.may_freeze",
            "params.may_unfreeze",
            "graph.per_rank",
            *_precision_tokens(settings),
        ),
        lacks=_CASTS if settings.precision == "bf16-true" else {},
        forbids=Rel(
            "world>1",
            "it trains one copy in one process, so each process would train alone",
            "strategy='ddp', or start one process",
        ),
    )


@dataclass(frozen=True)
class DdpOptions:
    """Options of torch's DistributedDataParallel, under its names."""

    find_unused_parameters: bool = False  # look for parameters without gradient in every step
    static_graph: bool = False  # the same parameters are used in every step
    bucket_cap_mb: int = 25  # MiB of gradients exchanged at once, > 0


def _ddp_claims(options: DdpOptions, settings: Settings) -> Claims:
    unused = {"find_unused_parameters": True}
    provides = [*_ALWAYS, *_precision_tokens(settings)]
    lacks = dict(_CASTS) if settings.precision == "bf16-true" else {}
    why = (
        "DDP waits for the gradient of every parameter unless find_unused_parameters=True, which "
        "looks through the graph in every step"
    )
    if options.find_unused_parameters:
        provides += ["params.may_freeze", "graph.per_rank"]
    lacks["params.may_unfreeze"] = (
        "DDP exchanges the gradients of the parameters that were trainable when it was made; "
        "one that becomes trainable later would drift apart between processes"
    )
    return Claims(
        provides=provides,
        lacks=lacks,
        adapts=(
            Adapt(unused, why + ", and processes may skip different layers", when="graph.random"),
            Adapt(unused, why + ", and some get frozen on the way", when="params.freeze_midrun"),
        ),
        settles=() if settings.sync_batchnorm else (_OWN_STATISTICS,),
    )


_OWN_STATISTICS = (
    "each process normalises BatchNorm with its own batch; buffers are rank 0's",
    "that is the definition of data-parallel training; SyncBatchNorm needs GPUs",
)


@dataclass(frozen=True)
class TorchDataOptions:
    """How a Dataset becomes batches; a DataLoader keeps its own."""

    batch_size: int | None = None  # samples a process and step, > 0; needed for a Dataset
    num_workers: int = 0  # worker processes of the DataLoader
    shuffle: bool | None = None  # None: training is shuffled, the other splits are not
    drop_last: bool = False  # leave out an incomplete last batch of training
    pin_memory: bool = False  # page-locked batches, for copies to a GPU
    collate_fn: Callable[[list[Any]], Any] | None = None  # samples to a batch; None: torch's
    shard: bool = False  # take every world-th sample of data that core cannot shard by itself
    sharded: bool = False  # the data gives every process its own part already


SINGLE = Component(
    name="single",
    summary="one process",
    build="torchweld.strategies.single:SingleStrategy",
    claims=_single_claims,
)
DDP = Component(
    name="ddp",
    summary="one copy a process, gradients averaged",
    build="torchweld.strategies.ddp:DdpStrategy",
    options=DdpOptions,
    claims=_ddp_claims,
)
TORCH = Component(
    name="torch",
    summary="any Dataset or DataLoader",
    build="torchweld.data.torch_source:TorchSource",
    options=TorchDataOptions,
    claims=Claims(
        provides="loader.torch",
        settles=(
            (
                "an uneven last batch counts by its real samples, on every process",
                "padding it with samples seen before would count those twice",
            ),
        ),
    ),
)


@hookimpl
def torchweld_strategies() -> list[Component]:
    """``single`` and ``ddp``."""
    return [SINGLE, DDP]


@hookimpl
def torchweld_data_sources() -> list[Component]:
    """``torch``."""
    return [TORCH]

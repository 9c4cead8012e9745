"""The options of ``fsdp``: plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

Wrap = Union[None, int, str, Callable[..., Any], Sequence[Any]]
"""Which modules are gathered one by one; see :func:`torchweld_fsdp.units.choose_units`.

A class or a policy of torch is a callable, too."""


@dataclass(frozen=True)
class FsdpOptions:
    """How parameters are sharded; without options as torch's ``fully_shard`` does it."""

    wrap: Wrap = None  # units: None finds them, or class names, a size, a predicate, modules
    reshard_after_forward: bool | int = True  # free units between forward and backward
    replicate: int = 1  # groups of ranks that hold the same shards (HSDP), a divisor of the ranks
    param_dtype: Literal["bf16", "fp16"] | None = None  # dtype in which parameters are gathered
    reduce_every_micro_batch: bool = False  # keep gradients sharded while they accumulate
    cpu_offload: bool = False  # keep shards in host memory; needs a CUDA device
    ignored: (
        str | tuple[str, ...]
    ) = ()  # names, or ends of names, of parameters each rank keeps whole
    forward_methods: str | tuple[str, ...] = ()  # methods that are called like forward
    deferred_init: bool = True  # build a model given as a function without memory for all of it


def as_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """One name, as the command line gives it, or several."""
    return (value,) if isinstance(value, str) else tuple(value)

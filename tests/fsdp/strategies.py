"""The same few steps under one strategy or another, and the states they lead to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW

from torchweld.builtin import DDP, SINGLE
from torchweld.components import Component, Settings
from torchweld.testing.strategy_bench import MODELS, Bench, one_step
from torchweld.testing.strategy_session import Case, Step
from torchweld_fsdp import FAIRSCALE_OSS, FAIRSCALE_SDP, FSDP

MOMENTUM = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
# With 1e-8, Adam divides the rounding noise of the attention's key bias by its own size.
ADAMW = partial(AdamW, lr=1e-2, eps=1e-4, weight_decay=0.1)
BY_NAME: Mapping[str, Component] = {
    component.name: component for component in (SINGLE, DDP, FSDP, FAIRSCALE_OSS, FAIRSCALE_SDP)
}


def is_layer(name: str, module: nn.Module) -> bool:
    """A predicate that makes units of all linear layers and convolutions."""
    return isinstance(module, (nn.Linear, nn.Conv2d))


def bench_of(strategy: str, world_size: int, **options: Any) -> Bench:
    """The strategy of this name on so many ranks."""
    return Bench(BY_NAME[strategy], options, world_size, 1e-6, 180.0)


def case_of(
    bench: Bench,
    model: str | Callable[[], nn.Module],
    settings: Settings | None = None,
    **changes: Any,
) -> Case:
    """A model under the strategy of ``bench``, with SGD and momentum."""
    make_model = MODELS[model][0] if isinstance(model, str) else model
    case = bench.case(make_model, settings or Settings())
    return replace(case, **{"optimizer": MOMENTUM, **changes})


def steps_of(model: str, count: int = 5, *, num_batches: int = 1, lr: float = 0.1) -> list[Step]:
    """Steps on different data, with another learning rate each."""
    return [
        one_step(model, seed=seed, num_batches=num_batches, lr=lr / (1 + seed))
        for seed in range(count)
    ]


def train(
    strategy: str,
    world_size: int,
    model: str,
    settings: Settings | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Take five steps; returns the whole state of model and optimizer."""
    bench = bench_of(strategy, world_size, **options)
    settings = settings or Settings()
    steps = steps_of(model, num_batches=settings.accumulate_grad_batches)
    case = case_of(bench, model, settings, **(changes or {}))
    return bench.train(case, *steps)[-1]


def different(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names that are not bitwise equal, or on one side only."""
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not left[name].equal(right[name])
    )


def largest_difference(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], names: Sequence[str] = ()
) -> float:
    """Over all weights, or those of ``names``."""
    names = names or [name for name in left if name.startswith("model/")]
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in names)

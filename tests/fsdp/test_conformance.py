"""The strategy ``fsdp``, held to what every strategy is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from torchweld.interfaces import Env
from torchweld.testing import StrategyConformance
from torchweld_fsdp import FSDP


def fsdp_loop(model: nn.Module, env: Env) -> Callable[[Tensor, Tensor], None]:
    """FSDP2 by hand: what every tutorial shows."""
    fully_shard(model)
    optimizer = SGD(model.parameters(), lr=0.01)

    def step(inputs: Tensor, targets: Tensor) -> None:
        torch.autograd.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()

    return step


class TestFsdp(StrategyConformance):
    component = FSDP
    collectives_per_step = 2  # one unit, the root: gathered for forward, scattered after backward
    reference_loops = (fsdp_loop,)
    timeout_seconds = 180.0


def is_layer(name: str, module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


class TestFsdpOfManyUnits(StrategyConformance):
    component = FSDP
    options: ClassVar = {"wrap": is_layer}
    world_sizes = (2,)
    timeout_seconds = 180.0


class TestFsdpThatKeepsUnitsGathered(StrategyConformance):
    component = FSDP
    options: ClassVar = {
        "wrap": is_layer,
        "reshard_after_forward": False,
        "reduce_every_micro_batch": True,
    }
    world_sizes = (2,)
    timeout_seconds = 180.0

"""The strategy ``deepspeed``, held to what every strategy is held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from tests.deepspeed.runs import told
from torchweld.interfaces import Env
from torchweld.testing import StrategyConformance
from torchweld_deepspeed import DEEPSPEED
from torchweld_deepspeed.imports import deepspeed_at_work


def engine_loop(model: nn.Module, env: Env, *, stage: int) -> Callable[[Tensor, Tensor], None]:
    """DeepSpeed by hand: what its own examples show."""
    optimizer = SGD(model.parameters(), lr=0.01)
    with deepspeed_at_work(env, verbose=False) as deepspeed:
        engine = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=told(stage, stage3_param_persistence_threshold=100),
        )[0]

    def step(inputs: Tensor, targets: Tensor) -> None:
        engine.backward(F.cross_entropy(engine(inputs), targets))
        engine.step()

    return step


class TestZero1(StrategyConformance):
    component = DEEPSPEED
    options: ClassVar = {"stage": 1}
    collectives_per_step = 4
    reference_loops = (partial(engine_loop, stage=1),)
    world_sizes = (2,)  # one process has no more at stage 1 than at stage 2
    timeout_seconds = 240.0


class TestZero2(StrategyConformance):
    component = DEEPSPEED
    options: ClassVar = {"stage": 2}
    collectives_per_step = 4
    reference_loops = (partial(engine_loop, stage=2),)
    timeout_seconds = 240.0


class TestZero3(StrategyConformance):
    component = DEEPSPEED
    options: ClassVar = {"stage": 3, "persistence_threshold": 100}
    reference_loops = (partial(engine_loop, stage=3),)
    timeout_seconds = 240.0


class TestZero2WithItsOptimizerInHostMemory(StrategyConformance):
    component = DEEPSPEED
    options: ClassVar = {"stage": 2, "offload_optimizer": "cpu"}
    world_sizes = (2,)
    timeout_seconds = 240.0


class TestZero3InHostMemory(StrategyConformance):
    component = DEEPSPEED
    options: ClassVar = {
        "stage": 3,
        "offload_optimizer": "cpu",
        "offload_params": "cpu",
        "persistence_threshold": 0,
    }
    world_sizes = (2,)
    timeout_seconds = 240.0

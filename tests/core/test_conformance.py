"""The built-in strategies and data source, held to what every stranger's is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from torchweld.builtin import DDP, SINGLE, TORCH
from torchweld.interfaces import Env
from torchweld.testing import DataSourceConformance, StrategyConformance


def plain_loop(model: nn.Module, env: Env) -> Callable[[Tensor, Tensor], None]:
    optimizer = SGD(model.parameters(), lr=0.01)

    def step(inputs: Tensor, targets: Tensor) -> None:
        torch.autograd.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()

    return step


def ddp_loop(model: nn.Module, env: Env) -> Callable[[Tensor, Tensor], None]:
    return plain_loop(DistributedDataParallel(model, process_group=env.group), env)


class TestSingle(StrategyConformance):
    component = SINGLE
    world_sizes = (1,)
    collectives_per_step = 0
    reference_loops = (plain_loop,)


class TestDdp(StrategyConformance):
    component = DDP
    collectives_per_step = 1
    reference_loops = (ddp_loop,)


class TestDdpLookingForUnusedParameters(StrategyConformance):
    component = DDP
    options: ClassVar = {"find_unused_parameters": True}
    world_sizes = (2,)
    collectives_per_step = 2  # which parameters were used is exchanged, too


class TestTorchSource(DataSourceConformance):
    component = TORCH
    draws_from = ("torch",)  # one number an epoch, as every loop over a DataLoader does


class TestTorchSourceWithWorkers(DataSourceConformance):
    component = TORCH
    draws_from = ("torch",)
    options: ClassVar = {"batch_size": 4, "num_workers": 1}
    world_sizes = (1,)

"""FairScale's OSS and ShardedDDP, held to what every strategy is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from torchweld.interfaces import Env
from torchweld.testing import StrategyConformance
from torchweld_fsdp.fairscale.components import FAIRSCALE_OSS, FAIRSCALE_SDP
from torchweld_fsdp.fairscale.imports import fairscale_module

Step = Callable[[Tensor, Tensor], None]


def by_hand(model: nn.Module, optimizer: Any) -> Step:
    def step(inputs: Tensor, targets: Tensor) -> None:
        torch.autograd.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()

    return step


def oss_loop(model: nn.Module, env: Env) -> Step:
    oss = fairscale_module("fairscale.optim").OSS(model.parameters(), optim=SGD, lr=0.01)
    return by_hand(DistributedDataParallel(model, process_group=env.group), oss)


def sdp_loop(model: nn.Module, env: Env) -> Step:
    oss = fairscale_module("fairscale.optim").OSS(model.parameters(), optim=SGD, lr=0.01)
    wrap = fairscale_module("fairscale.nn.data_parallel").ShardedDataParallel
    return by_hand(wrap(model, oss, reduce_buffer_size=0), oss)


class TestOss(StrategyConformance):
    component = FAIRSCALE_OSS
    collectives_per_step = 3  # DDP's one, and a broadcast of each rank's share
    reference_loops = (oss_loop,)


class TestOssLookingForUnusedParameters(StrategyConformance):
    component = FAIRSCALE_OSS
    options: ClassVar = {"find_unused_parameters": True}
    world_sizes = (2,)
    collectives_per_step = 4  # which parameters were used is exchanged, too


class TestSdp(StrategyConformance):
    component = FAIRSCALE_SDP
    collectives_per_step = 6  # a reduce of each of 4 tensors, a broadcast of each rank's share
    reference_loops = (sdp_loop,)

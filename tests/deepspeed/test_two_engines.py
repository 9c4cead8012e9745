"""Two engines in one process: two networks that train against each other, as in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from tests.deepspeed.runs import SECONDS, STAGES, bench_of, largest_difference
from torchweld.components import Settings
from torchweld.interfaces import Prepared, SetupRequest
from torchweld.model.parameters import make_groups
from torchweld.processes.ranks import launch
from torchweld.testing import run_ranks
from torchweld.testing.processes import RanksFailed
from torchweld.testing.states import assemble, keep

PLAIN = partial(SGD, lr=0.5, momentum=0.5)
STEPS, BATCH = 3, 4


def networks() -> tuple[nn.Module, nn.Module]:
    """A generator, and a discriminator."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 3))
    return generator, nn.Sequential(nn.Linear(3, 13), nn.Tanh(), nn.Linear(13, 1))


def batches(rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of noise ``(batch, 5)`` and real samples ``(batch, 3)``."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        noise = torch.randn(BATCH, 5, generator=draw)
        yield noise[rank::world_size], torch.randn(BATCH, 3, generator=draw)[rank::world_size]


def discrimination(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def by_hand() -> dict[str, Tensor]:
    """In one process, on whole batches."""
    generator, discriminator = networks()
    optimizers = [PLAIN(model.parameters()) for model in (generator, discriminator)]
    for noise, real in batches(0, 1):
        discrimination(discriminator(real), discriminator(generator(noise).detach())).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        F.softplus(-discriminator(generator(noise))).mean().backward()
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return {
        f"model/{place}.{name}": weight.detach()
        for place, model in enumerate((generator, discriminator))
        for name, weight in model.named_parameters()
    }


def by_zero(stage: int, freezes: bool) -> list[list[Any]]:
    """The pieces of both after the same steps."""
    ranks = launch("cpu")
    strategy = bench_of(f"zero{stage}", ranks.world_size, persistence_threshold=20).chosen().make()
    ranks.join(strategy.backend)
    models = networks()
    pair: list[Prepared] = []
    for model in models:
        request = SetupRequest(make_groups(model, None), PLAIN, (), (), ranks.env, Settings())
        pair.append(strategy.setup(model, request))
    generator, discriminator = pair
    for noise, real in batches(ranks.rank, ranks.world_size):
        made = generator.forward(noise).detach()
        discriminator.backward(
            discrimination(discriminator.forward(real), discriminator.forward(made))
        )
        discriminator.step()
        with discriminator.frozen() if freezes else nullcontext():
            generator.backward(F.softplus(-discriminator.forward(generator.forward(noise))).mean())
        generator.step()
    kept = [keep(prepared.shards()) for prepared in pair]
    strategy.teardown()
    return kept


def trained(stage: int, *, freezes: bool) -> dict[str, Tensor]:
    by_rank = run_ranks(by_zero, 2, stage, freezes, timeout_seconds=SECONDS)
    return {
        name.replace("model/", f"model/{place}."): tensor
        for place in (0, 1)
        for name, tensor in assemble([kept[place] for kept in by_rank]).items()
        if name.startswith("model/")
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_generator_and_a_discriminator_train_as_in_plain_pytorch(stage: int) -> None:
    assert largest_difference(trained(stage, freezes=True), by_hand()) <= 1e-6


def test_without_freezing_stage_1_adds_gradients_of_a_step_that_is_not_its_own() -> None:
    assert largest_difference(trained(1, freezes=False), by_hand()) >= 1e-4


@pytest.mark.parametrize(("stage", "said"), [(2, "already been reduced"), (3, "has no attribute")])
def test_without_freezing_stages_2_and_3_fail(stage: int, said: str) -> None:
    with pytest.raises(RanksFailed, match=said):
        trained(stage, freezes=False)

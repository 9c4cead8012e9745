"""Drawn combinations of settings against the same training written by hand: bitwise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.utils.data import TensorDataset

from tests.parity.training import different, weights, windows
from torchweld import LRSchedule, Trainer, use
from torchweld.testing import empty_registry, run_ranks

S = lr_scheduler
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.01),
}


def warm_up(optimizer: Optimizer, total: int) -> S.LRScheduler:
    return S.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, total // 2)))


BY_STEP: dict[str, Any] = {
    "cosine": S.CosineAnnealingLR,
    "warm-up": warm_up,
    "one cycle": lambda optimizer, total: S.OneCycleLR(optimizer, 0.1, total_steps=total),
}
BY_EPOCH: dict[str, Any] = {"by epoch": lambda optimizer, _: S.ExponentialLR(optimizer, 0.5)}


@dataclass(frozen=True)
class Drawn:
    """One combination."""

    samples: int
    batch: int
    accumulate: int
    clip: tuple[str, float] | None
    precision: str
    schedule: str | None
    optimizer: str
    epochs: int


CLIPS: tuple[tuple[str, float] | None, ...] = (None, ("norm", 0.1), ("norm", 10.0))


def drawings(
    *, clips: Sequence[tuple[str, float] | None] = (*CLIPS, ("value", 0.01))
) -> st.SearchStrategy[Drawn]:
    """All combinations, with these ways of clipping."""
    return st.builds(
        Drawn,
        samples=st.integers(1, 30),
        batch=st.integers(1, 8),
        accumulate=st.integers(1, 4),
        clip=st.sampled_from(clips),
        precision=st.sampled_from(["32", "bf16", "bf16-true"]),
        schedule=st.sampled_from([None, *BY_STEP, *BY_EPOCH]),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        epochs=st.integers(1, 3),
    )


def make_data(num_samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def fitted(drawn: Drawn, strategy: Any, model: nn.Module) -> Trainer:
    """The trainer that has trained ``model``."""
    schedule = BY_STEP.get(drawn.schedule or "")
    if drawn.schedule in BY_EPOCH:
        schedule = LRSchedule(BY_EPOCH[drawn.schedule], interval="epoch")
    algorithm, limit = drawn.clip or ("norm", None)
    trainer = Trainer(
        strategy=strategy, data=use("torch", batch_size=drawn.batch, shuffle=False),
        precision=drawn.precision, max_epochs=drawn.epochs, barebones=True,
        accumulate_grad_batches=drawn.accumulate, gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm, registry=empty_registry(),  # type: ignore[arg-type]  # drawn
    )  # fmt: skip
    trainer.fit(
        model, make_data(drawn.samples), loss=F.cross_entropy, lr_scheduler=schedule,
        optimizer=OPTIMIZERS[drawn.optimizer],
    )  # fmt: skip
    return trainer


def trained(drawn: Drawn, strategy: str) -> dict[str, Tensor]:
    model = make_model()
    fitted(drawn, strategy, model)
    return weights(model)


def forward(model: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """Autocast, or a model that was cast; outputs in fp32 as every strategy returns them."""
    if precision == "bf16-true":
        inputs = inputs.bfloat16()
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with cast:
        return model(inputs).float()  # type: ignore[no-any-return]  # a module


@dataclass(frozen=True)
class Manner:
    """Where strategies that shard part from DDP, and a loop by hand can follow them.

    Attributes:
        keeps_fp32: copies in fp32 of cast parameters are stepped, and cast back into them.
        exchanges_each: each micro-batch's gradients are averaged over the ranks, then added up.
    """

    keeps_fp32: bool = False
    exchanges_each: bool = False


def window_by_hand(drawn: Drawn, called: Any, window: list[Any], *, exchanges_each: bool) -> None:
    """Leave the gradients of a window in the parameters."""
    exchanged = []
    for place, (inputs, targets, weight) in enumerate(window):
        if isinstance(called, DistributedDataParallel):
            called.require_backward_grad_sync = exchanges_each or place == len(window) - 1
        loss = F.cross_entropy(forward(called, inputs, drawn.precision), targets)
        loss = loss * weight if weight != 1.0 else loss
        (loss / len(window) if drawn.accumulate > 1 else loss).backward()
        if exchanges_each:
            exchanged.append([p.grad for p in called.parameters()])
            called.zero_grad()
    if exchanges_each:
        for parameter, *gradients in zip(called.parameters(), *exchanged, strict=True):
            parameter.grad = reduce(torch.add, gradients)


def step_by_hand(drawn: Drawn, stepped: list[nn.Parameter], optimizer: Optimizer) -> None:
    if drawn.clip is not None:
        algorithm, limit = drawn.clip
        clip: Any = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
        clip(stepped, limit)
    optimizer.step()
    optimizer.zero_grad()


def step_copies(
    drawn: Drawn, model: nn.Module, copies: list[nn.Parameter], optimizer: Optimizer
) -> None:
    """Step copies in fp32 by the gradients of the model, and cast them into it."""
    for parameter, copy in zip(model.parameters(), copies, strict=True):
        copy.grad = parameter.grad.float() if parameter.grad is not None else None
    model.zero_grad()
    step_by_hand(drawn, copies, optimizer)
    with torch.no_grad():
        for parameter, copy in zip(model.parameters(), copies, strict=True):
            parameter.copy_(copy)


def micro_batches(drawn: Drawn, rank: int, world: int) -> list[tuple[Tensor, Tensor, float]]:
    """This rank's part of each global batch, and what its mean counts in the mean over ranks."""
    inputs, targets = make_data(drawn.samples).tensors
    found = []
    for first in range(0, drawn.samples, drawn.batch * world):
        indices = torch.arange(first, min(first + drawn.batch * world, drawn.samples))
        mine = indices[rank::world]
        weight = len(mine) * world / len(indices)
        mine = mine if len(mine) else indices[:1]  # only there to stay in step: weighs 0
        found.append((inputs[mine], targets[mine], weight))
    return found


def by_hand(
    drawn: Drawn, rank: int = 0, world: int = 1, manner: Manner = Manner()
) -> dict[str, Tensor]:
    """What is stepped, afterwards, by the names of the parameters."""
    model = make_model()
    if drawn.precision == "bf16-true":
        model.bfloat16()
    copies = manner.keeps_fp32 and drawn.precision == "bf16-true"
    stepped = [nn.Parameter(p.detach().float()) if copies else p for p in model.parameters()]
    called: Any = DistributedDataParallel(model) if world > 1 else model
    optimizer = OPTIMIZERS[drawn.optimizer](stepped)
    batches = micro_batches(drawn, rank, world)
    total = -(-len(batches) // drawn.accumulate) * drawn.epochs
    by_step, by_epoch = BY_STEP.get(drawn.schedule or ""), BY_EPOCH.get(drawn.schedule or "")
    make = by_step or by_epoch
    scheduler: Any = make(optimizer, total) if make else None
    for _ in range(drawn.epochs):
        for window in windows(iter(batches), drawn.accumulate):
            window_by_hand(drawn, called, window, exchanges_each=manner.exchanges_each)
            if copies:
                step_copies(drawn, model, stepped, optimizer)
            else:
                step_by_hand(drawn, stepped, optimizer)
            if by_step:
                scheduler.step()
        if by_epoch:
            scheduler.step()
    names = (name for name, _ in model.named_parameters())
    return {name: p.detach() for name, p in zip(names, stepped, strict=True)}


@settings(
    max_examples=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(drawn=drawings())
def test_single_equals_a_loop_by_hand_bitwise_whatever_is_combined(drawn: Drawn) -> None:
    assert different(trained(drawn, "single"), by_hand(drawn)) == []


def differences(examples: list[Drawn]) -> list[list[str]]:
    """On each rank, what differs between ddp and DistributedDataParallel by hand."""
    found = []
    for drawn in examples:
        mine = trained(drawn, "ddp")
        expected = by_hand(drawn, dist.get_rank(), dist.get_world_size())
        found.append(different(mine, expected))
    return found


def draw(count: int, strategy: st.SearchStrategy[Drawn]) -> list[Drawn]:
    """The same examples in every run."""
    examples: list[Drawn] = []

    @settings(max_examples=count, derandomize=True, deadline=None, database=None)
    @given(drawn=strategy)
    def keep(drawn: Drawn) -> None:
        examples.append(drawn)

    keep()
    return examples


def test_ddp_equals_torchs_by_hand_bitwise_whatever_is_combined() -> None:
    examples = draw(12, drawings())

    for answers in run_ranks(differences, 2, examples):
        assert {
            str(drawn): names for drawn, names in zip(examples, answers, strict=True) if names
        } == {}

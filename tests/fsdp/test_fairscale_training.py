"""Training under ``fairscale_oss`` and ``fairscale_sdp``: parity, memory, cost, checkpoints."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fsdp.fairscale_runs import (
    Blocks,
    Training,
    by_hand,
    compiled,
    difference,
    make_session,
    recomputing,
    shapes_of,
    through_torchweld,
)
from torchweld.builtin import DDP
from torchweld.components import Chosen, Component, Settings
from torchweld.testing import models, run_ranks
from torchweld_fsdp.fairscale.components import FAIRSCALE_OSS, FAIRSCALE_SDP

BOTH = pytest.mark.parametrize("component", [FAIRSCALE_OSS, FAIRSCALE_SDP], ids=lambda c: c.name)
CLIPPED = Settings(accumulate_grad_batches=2, gradient_clip_val=0.5)
ADAMW = partial(AdamW, lr=0.01, eps=1e-4)


def biases_fast(name: str, _module: nn.Module, _parameter: nn.Parameter) -> dict[str, object]:
    return {"lr": 0.3, "weight_decay": 0.0} if name.endswith("bias") else {}


def frozen_apart(_name: str, _module: nn.Module, parameter: nn.Parameter) -> dict[str, object]:
    return {} if parameter.requires_grad else {"lr": 0.0}


CASES = {
    "mlp": Training(settings=CLIPPED, steps=5),
    "gpt": Training(models.TinyGpt, models.tokens, settings=CLIPPED, steps=5),
    "frozen": Training(models.frozen_mlp, settings=CLIPPED, steps=5),
    "a frozen group": Training(models.frozen_mlp, groups=frozen_apart, settings=CLIPPED, steps=5),
    "groups": Training(groups=biases_fast, settings=CLIPPED, steps=5),
}


@BOTH
@pytest.mark.parametrize(("case", "world_size"), [*product(CASES, [1, 2]), ("mlp", 4), ("gpt", 4)])
def test_training_equals_one_process_on_the_whole_batch(
    component: Component, case: str, world_size: int
) -> None:
    expected = by_hand(CASES[case])

    for rank in run_ranks(through_torchweld, world_size, CASES[case], component):
        assert difference(rank.weights, expected.weights) <= 2e-7
        for found, norm in zip(rank.norms, expected.norms, strict=True):
            assert abs(float(found) / float(norm) - 1) <= 3e-7


@BOTH
@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-true"])
def test_two_ranks_equal_ddp_bitwise_without_clipping(component: Component, precision: Any) -> None:
    training = Training(optimizer=ADAMW, settings=Settings(precision=precision))
    expected = run_ranks(through_torchweld, 2, training, DDP)

    ranks = run_ranks(through_torchweld, 2, training, component)

    assert [difference(r.weights, expected[0].weights) for r in ranks] == [0.0, 0.0]


@BOTH
@pytest.mark.parametrize("make_model", [recomputing, compiled])
def test_recomputed_and_compiled_blocks_train_as_plain_ones(
    component: Component, make_model: Any
) -> None:
    training = Training(make_model, settings=Settings(gradient_clip_val=0.5))

    for rank in run_ranks(through_torchweld, 2, training, component):
        assert (
            difference(rank.weights, by_hand(replace(training, make_model=Blocks)).weights) <= 1e-7
        )


# ---- memory ------------------------------------------------------------------------------------


class Gpt(nn.Module):
    """5.3 M parameters, tied, in tensors of the sizes that a language model has."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(2048, 256), nn.Embedding(64, 256)
        layer = partial(nn.TransformerEncoderLayer, 256, 4, 1024, batch_first=True, dropout=0.0)
        self.blocks = nn.ModuleList([layer() for _ in range(6)])
        self.head = nn.Linear(256, 2048, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits.transpose(1, 2)


MEMORY = Training(Gpt, models.tokens, optimizer=ADAMW, steps=1)


@BOTH
@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_are_as_estimated_and_shared_evenly(component: Component, world_size: int) -> None:
    shapes = shapes_of(Gpt())
    whole = sum(4 * math.prod(one.shape) for one in shapes.values())
    strategy = Chosen("strategy", component, component.options()).make()  # type: ignore[misc]
    estimate = strategy.estimate(shapes, 2, world_size, Settings())

    held = [r.bytes for r in run_ranks(through_torchweld, world_size, MEMORY, component)]

    assert {h["parameters"] for h in held} == {estimate["parameters"]} == {whole}
    assert max(h["gradients"] for h in held) == estimate["gradients"]
    counters = 4 * len(shapes)  # Adam's step of each parameter, four bytes
    assert (
        estimate["optimizer"]
        <= max(h["optimizer"] for h in held)
        <= (estimate["optimizer"] + counters)
    )
    # OSS gives tensors away whole, each to the rank that has least; measured -9 % to 9.6 % on 4.
    uneven = 0.06 if world_size == 2 else 0.1
    for rank in held:
        assert abs(rank["optimizer"] * world_size / (2 * whole) - 1) <= uneven
        if component is FAIRSCALE_SDP:
            assert abs(rank["gradients"] * world_size / whole - 1) <= uneven


# ---- cost --------------------------------------------------------------------------------------


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives, those of C++ included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is untyped
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def cost_of_a_step(component: Component, settings: Settings) -> tuple[int, int]:
    """Python calls and collectives between backward and the next forward."""
    session = make_session(replace(MEMORY, settings=settings), component)
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    for step in range(3):
        session.prepared.backward(session.loss(models.tokens(8, seed=step)))
        if step == 1:
            sys.setprofile(count)
        session.prepared.step()
        sys.setprofile(None)
    session.prepared.backward(session.loss(models.tokens(8, seed=3)))
    with CollectiveCounter() as counter:
        session.prepared.step()
    return calls, counter.calls


def test_clipping_under_sdp_costs_one_reduce_and_few_calls() -> None:
    plain_calls, plain = run_ranks(cost_of_a_step, 2, FAIRSCALE_SDP, Settings())[0]

    clipped = Settings(gradient_clip_val=0.1)
    calls, collectives = run_ranks(cost_of_a_step, 2, FAIRSCALE_SDP, clipped)[0]

    assert collectives == plain + 1
    assert calls <= plain_calls + 20

"""Averaged weights under ZeRO, whose engine keeps other copies of the weights than the model's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import TensorDataset

from torchweld import Trainer, use
from torchweld.testing import models, run_ranks

SAMPLES, BATCH, STEPS = 40, 8, 10  # two epochs
OPTIMIZER = partial(SGD, lr=0.1, momentum=0.9)
SMOOTHING = 0.7


def make_data() -> TensorDataset:
    return TensorDataset(*models.features(SAMPLES))


class Found(NamedTuple):
    """Weights, their average, and what validation says of both."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    losses: tuple[float, float, float]


def fit(strategy: str, options: dict[str, Any], stops: bool = False) -> Found:
    from torchweld_composer.imports import composer_module

    def trainer_until(step: int) -> Trainer:
        average = composer_module("composer.algorithms").EMA(
            half_life=None, smoothing=SMOOTHING, update_interval="1ba"
        )
        return Trainer(
            strategy=use(strategy, **options), surgery=[average], max_steps=step, seed=3,
            data=use("torch", batch_size=BATCH // 2, shuffle=False), default_root_dir="runs",
            logger=False, enable_progress_bar=False,
        )  # fmt: skip

    def go_on(trainer: Trainer, path: Path | None) -> Any:
        torch.manual_seed(0)
        return trainer.fit(
            models.mlp(), make_data(), make_data(), loss=F.cross_entropy, optimizer=OPTIMIZER,
            ckpt_path=path,
        )  # fmt: skip

    path = go_on(trainer_until(4), None).checkpoint if stops else None
    trainer = trainer_until(STEPS)
    metrics = go_on(trainer, path).metrics
    again = trainer.evaluate(data=make_data(), weights="average")["loss"]
    average = load_file(trainer.export("average.safetensors", weights="average"))
    weights = load_file(trainer.export("weights.safetensors"))
    return Found(weights, average, (metrics["val_loss"], metrics["val_loss/average"], again))


def by_hand() -> Found:
    """In one process, on whole batches."""
    torch.manual_seed(0)
    model = models.mlp()
    optimizer = OPTIMIZER(model.parameters())
    average: dict[str, Tensor] = {}
    inputs, targets = make_data().tensors
    for step in range(STEPS):
        batch = slice(step * BATCH % SAMPLES, step * BATCH % SAMPLES + BATCH)
        F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, weight in model.named_parameters():
            new = weight.detach().clone()  # Composer begins with the weights after a step
            average[name] = SMOOTHING * average.get(name, new) + (1 - SMOOTHING) * new
    weights = {n: p.detach() for n, p in model.named_parameters()}
    losses = [
        float(F.cross_entropy(torch.func.functional_call(model, each, (inputs,)), targets))
        for each in (weights, average, average)
    ]
    return Found(weights, average, (losses[0], losses[1], losses[2]))


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("ddp", {}), ("deepspeed", {"stage": 1}), ("deepspeed", {"stage": 2})],
    ids=str,
)
def test_an_average_of_the_weights_is_that_by_hand(strategy: str, options: dict[str, Any]) -> None:
    expected = by_hand()

    found, other = run_ranks(fit, 2, strategy, options, timeout_seconds=240)

    assert furthest(found.weights, expected.weights) <= 1e-6
    assert furthest(found.average, expected.average) <= 1e-6
    assert found.losses == other.losses == pytest.approx(expected.losses, abs=1e-6)
    assert furthest(expected.weights, expected.average) > 1e-2


def test_an_average_is_resumed_bitwise() -> None:
    whole, _ = run_ranks(fit, 2, "deepspeed", {"stage": 2}, timeout_seconds=240)

    resumed, _ = run_ranks(fit, 2, "deepspeed", {"stage": 2}, True, timeout_seconds=240)

    assert furthest(resumed.weights, whole.weights) == 0.0
    assert furthest(resumed.average, whole.average) == 0.0
    assert resumed.losses == whole.losses

"""``deepspeed`` against DDP written by hand: windows of unequal length, clipping, groups, bf16."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import optim
from torch.optim import SGD

from tests.deepspeed.runs import (
    SECONDS,
    STAGES,
    Trained,
    Training,
    branching,
    by_hand,
    by_zero,
    decays_matrices,
    different,
    largest_difference,
    training_of,
)
from torchweld.testing import models, run_ranks
from torchweld.testing.states import assemble

SGD_MOMENTUM = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
TRAININGS: Mapping[str, Training] = {
    "mlp": training_of("mlp"),
    "frozen": training_of("frozen"),
    "groups": training_of("mlp", rule=decays_matrices),
    "gpt": training_of("gpt"),
    # Bias before BatchNorm has no gradient but noise, which Adam would divide by its own size.
    "batchnorm": training_of(
        "convnet", make_model=models.batchnorm_convnet, optimizer=SGD_MOMENTUM
    ),
}


def zero(training: Training, world_size: int = 2, **options: Any) -> list[Trained]:
    found: list[Trained] = run_ranks(
        by_zero, world_size, training, options, timeout_seconds=SECONDS
    )
    return found


def hand(training: Training, **changes: Any) -> list[Trained]:
    found: list[Trained] = run_ranks(
        partial(by_hand, **changes), 2, training, timeout_seconds=SECONDS
    )
    return found


def check_close(found: list[Trained], expected: list[Trained], losses: float, norms: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=losses)
        assert one.norms == pytest.approx(other.norms, rel=norms)
    left, right = (assemble([one.state for one in each]) for each in (found, expected))
    assert left.keys() == right.keys()


def weights_apart(found: list[Trained], expected: list[Trained]) -> float:
    return largest_difference(
        *(assemble([one.state for one in each]) for each in (found, expected))
    )


@pytest.mark.parametrize("model", TRAININGS)
def test_every_stage_trains_as_ddp_does(model: str) -> None:
    training = TRAININGS[model]
    expected = hand(training)

    for stage in STAGES:
        found = zero(training, stage=stage, persistence_threshold=100)
        check_close(found, expected, losses=2e-6, norms=2e-7)
        assert weights_apart(found, expected) <= 1e-4


def test_stage_1_is_ddp_bitwise_without_clipping() -> None:
    training = training_of("mlp", clip=None)
    expected = hand(training)

    found = zero(training, stage=1)

    assert [one.losses for one in found] == [one.losses for one in expected]
    assert different(*(assemble([o.state for o in each]) for each in (found, expected))) == []


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_without_gradient_is_stepped_with_zeros(stage: int, offload: Any) -> None:
    training = branching()
    expected = hand(training, zeros=True)

    found = zero(training, stage=stage, persistence_threshold=0, offload_optimizer=offload)

    check_close(found, expected, losses=2e-7, norms=3e-7)
    assert weights_apart(found, expected) <= 1e-7


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_that_of_ddp(stage: int) -> None:
    training = training_of("mlp", precision="bf16")
    expected = hand(training)

    found = zero(training, stage=stage)

    check_close(found, expected, losses=1e-6, norms=1e-6)
    assert weights_apart(found, expected) <= 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_cast_parameters_train_about_as_fp32_does(stage: int) -> None:
    expected = hand(training_of("mlp"))

    found = zero(training_of("mlp", precision="bf16-true"), stage=stage)

    # Pieces are fp32, so only outputs and gradients are rounded to 8 bits.
    for one, other in zip(found, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=5e-2)
    assert {kept.local.dtype for one in found for kept in one.state} == {torch.float32}


OPTIMIZERS = (
    partial(optim.Adam, lr=1e-2, eps=1e-4),
    partial(optim.AdamW, lr=1e-2, eps=1e-4, amsgrad=True),
    partial(optim.Adamax, lr=1e-2, eps=1e-4),
    partial(optim.NAdam, lr=1e-2, eps=1e-4),
    partial(optim.RAdam, lr=1e-2, eps=1e-4),
    partial(optim.RMSprop, lr=1e-2, eps=1e-3, momentum=0.9, centered=True),
    partial(optim.Adagrad, lr=1e-2, eps=1e-4),
    partial(optim.Adadelta, lr=1e-2),
    partial(optim.ASGD, lr=1e-2),
    SGD_MOMENTUM,
)


def each_by_zero(trainings: list[Training], options: Mapping[str, Any]) -> list[Trained]:
    return [by_zero(training, options) for training in trainings]


def each_by_hand(trainings: list[Training]) -> list[Trained]:
    return [by_hand(training) for training in trainings]


def test_elementwise_optimizers_step_as_in_ddp() -> None:
    # Adagrad is made anew by DeepSpeed with its defaults, so the rate of a step is set later.
    trainings = [training_of("mlp", optimizer=optimizer) for optimizer in OPTIMIZERS]
    expected = run_ranks(each_by_hand, 2, trainings, timeout_seconds=SECONDS)

    for stage in (2, 3):
        found = run_ranks(each_by_zero, 2, trainings, {"stage": stage}, timeout_seconds=SECONDS)
        for optimizer, one, other in zip(
            OPTIMIZERS, zip(*found, strict=True), zip(*expected, strict=True), strict=True
        ):
            assert weights_apart(list(one), list(other)) <= 1e-6, optimizer

"""What raw FairScale gets wrong without a word, and that it is right here.

Every remedy stands beside a control: the same training with FairScale alone, which goes wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from tests.fsdp.fairscale_runs import (
    Trained,
    Training,
    by_hand,
    difference,
    raw_oss,
    raw_sdp,
    through_torchweld,
)
from torchweld.components import Component, Settings
from torchweld.testing import models, run_ranks
from torchweld_fsdp.fairscale.components import FAIRSCALE_OSS, FAIRSCALE_SDP

ROUNDING = 1e-7
WRONG = 1e-3

BRANCHING = Training(make_model=models.Branching, uses_branch=(True, False))
FREEZING = Training(freezes="0.")
EARLY_BRANCH = Training(
    make_model=models.Branching,
    uses_branch=(True, False),
    settings=Settings(accumulate_grad_batches=2),
)
BOTH = pytest.mark.parametrize("component", [FAIRSCALE_OSS, FAIRSCALE_SDP], ids=lambda c: c.name)


def check_equal(ranks: list[Trained], expected: Trained, tolerance: float = ROUNDING) -> None:
    assert difference(ranks[1].weights, ranks[0].weights) == 0.0
    assert difference(ranks[0].weights, expected.weights) <= tolerance


# ---- schedules -------------------------------------------------------------------------------


def decay(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def one_cycle(optimizer: Any) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=6)


ADAMW = partial(AdamW, lr=0.01, eps=1e-4)


def test_raw_oss_ignores_a_schedule_over_its_inner_optimizer() -> None:
    training = Training(schedule=decay)
    unscheduled = run_ranks(raw_oss, 2, Training())

    ranks = run_ranks(_raw_oss_inner, 2, training)

    assert difference(ranks[0].weights, unscheduled[0].weights) == 0.0


def _raw_oss_inner(training: Training) -> Trained:
    return raw_oss(training, schedule_inner=True)


def test_raw_oss_has_no_betas_for_one_cycle() -> None:
    with pytest.raises(AssertionError, match="must support momentum or beta"):
        run_ranks(raw_oss, 2, Training(schedule=one_cycle, optimizer=ADAMW))


@BOTH
@pytest.mark.parametrize("schedule", [decay, one_cycle])
def test_a_schedule_has_its_effect(component: Component, schedule: Any) -> None:
    training = Training(schedule=schedule, optimizer=ADAMW)

    ranks = run_ranks(through_torchweld, 2, training, component)

    check_equal(ranks, by_hand(training), tolerance=1e-6)  # Adam divides rounding by itself


# ---- gradients that are zero instead of None -------------------------------------------------


def test_raw_sdp_trains_wrongly_with_its_buffers() -> None:
    ranks = run_ranks(raw_sdp, 2, Training())

    assert difference(ranks[0].weights, by_hand(Training()).weights) > WRONG


@pytest.mark.parametrize("training", [BRANCHING, FREEZING], ids=["branch", "freeze"])
def test_raw_sdp_moves_what_has_no_gradient(training: Training) -> None:
    ranks = run_ranks(_raw_sdp_of_the_model, 2, training)

    assert difference(ranks[0].weights, by_hand(training).weights) > WRONG


def _raw_sdp_of_the_model(training: Training) -> Trained:
    return raw_sdp(training, zero="model", set_to_none=False)


def test_raw_sdp_lets_ranks_drift_when_a_layer_is_frozen() -> None:
    ranks = run_ranks(_raw_sdp_of_the_model, 2, FREEZING)

    assert difference(ranks[0].weights, ranks[1].weights) > WRONG


@pytest.mark.parametrize(
    "training",
    [Training(), BRANCHING, FREEZING, EARLY_BRANCH],
    ids=["plain", "branch", "freeze", "early branch"],
)
@BOTH
def test_what_has_no_gradient_stays(component: Component, training: Training) -> None:
    unused = {"find_unused_parameters": True} if component is FAIRSCALE_OSS else {}

    ranks = run_ranks(through_torchweld, 2, training, component, unused)

    check_equal(ranks, by_hand(training))


def test_raw_sdp_steps_a_layer_of_an_earlier_micro_batch_by_one_ranks_gradient() -> None:
    ranks = run_ranks(_raw_sdp_best, 2, EARLY_BRANCH)

    assert difference(ranks[0].weights, by_hand(EARLY_BRANCH).weights) > WRONG


def _raw_sdp_best(training: Training) -> Trained:
    return raw_sdp(training, buffer=0)


# ---- clipping --------------------------------------------------------------------------------


LATE_BRANCH = Training(
    make_model=models.Branching,
    uses_branch=(False, True),
    settings=Settings(gradient_clip_val=0.1),
)


def test_raw_oss_norm_forgets_what_had_no_gradient_at_first() -> None:
    ranks = run_ranks(_raw_sdp_best, 2, LATE_BRANCH)

    expected = float(by_hand(LATE_BRANCH).norms[1])
    assert abs(float(ranks[0].norms[1]) / expected - 1) > 0.01


def clamped(named: Iterable[tuple[str, Any]]) -> None:
    """What clips single elements, as Composer's GradientClipping by value."""
    for _, parameter in named:
        if parameter.grad is not None:
            parameter.grad.clamp_(-0.005, 0.005)


@BOTH
def test_gradients_of_a_window_are_finished_when_they_are_transformed(component: Component) -> None:
    """ShardedDDP itself leaves out what only earlier micro-batches of the window used."""
    training = replace(EARLY_BRANCH, transforms=(clamped,))
    unused = {"find_unused_parameters": True} if component is FAIRSCALE_OSS else {}
    expected = by_hand(training)
    assert difference(by_hand(EARLY_BRANCH).weights, expected.weights) > WRONG

    check_equal(run_ranks(through_torchweld, 2, training, component, unused), expected)


@BOTH
def test_the_norm_is_whole_and_equal_on_all_ranks(component: Component) -> None:
    unused = {"find_unused_parameters": True} if component is FAIRSCALE_OSS else {}

    ranks = run_ranks(through_torchweld, 2, LATE_BRANCH, component, unused)

    expected = by_hand(LATE_BRANCH)
    check_equal(ranks, expected)
    assert [float(n) for n in ranks[0].norms] == [float(n) for n in ranks[1].norms]
    for found, norm in zip(ranks[0].norms, expected.norms, strict=True):
        assert type(found) is torch.Tensor
        assert abs(float(found) / float(norm) - 1) <= 3e-7

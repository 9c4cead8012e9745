"""What ``deepspeed`` claims, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from tests.deepspeed.runs import (
    SECONDS,
    bench_of,
    by_engine,
    by_hand,
    by_zero,
    case_of,
    steps_of,
    told,
    training_of,
)
from torchweld import Claims, Component, Rel, Trainer, use
from torchweld.components import Settings
from torchweld.errors import TorchweldError
from torchweld.setup.memory import parameter_shapes, slots_of
from torchweld.testing import models, run_ranks
from torchweld.testing.processes import RanksFailed
from torchweld.testing.strategy_bench import channels_last_convnet
from torchweld.testing.strategy_session import Case, Step, prepared
from torchweld_deepspeed import DEEPSPEED, DeepSpeedOptions
from torchweld_deepspeed.components import deepspeed_claims


@pytest.mark.parametrize(
    ("stage", "precision", "provided"),
    [
        (1, "32", {"params.local", "precision.autocast"}),
        (2, "bf16", {"params.local", "precision.autocast"}),
        (3, "32", {"precision.autocast"}),
        (2, "bf16-true", {"params.local"}),
        (3, "16", set()),
    ],
)
def test_what_is_provided_follows_from_stage_and_precision(
    stage: Any, precision: Any, provided: set[str]
) -> None:
    claims = deepspeed_claims(DeepSpeedOptions(stage=stage), Settings(precision=precision))

    assert set(claims.provides) == provided
    assert not provided & claims.lacks.keys()


@pytest.mark.parametrize(
    ("stage", "token"),
    [
        *((2, token) for token in sorted(deepspeed_claims(DeepSpeedOptions(), Settings()).lacks)),
        (3, "params.local"),  # an average of weights needs it
    ],
)
def test_a_surgery_that_needs_what_is_lacking_is_refused_with_the_reason(
    stage: Any, token: str
) -> None:
    surgery = Component(
        "needy", "needs it", lambda: None, claims=Claims(requires=Rel(token, "it needs it"))
    )
    options = DeepSpeedOptions(stage=stage)
    strategy = use("deepspeed", stage=stage)
    plan = Trainer(strategy=strategy, surgery=[surgery], barebones=True).plan

    (problem,) = plan.problems

    assert problem.code == "TW301"
    assert deepspeed_claims(options, Settings()).lacks[token] in problem.why


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("deepspeed", {"stage": 2}),
        ("deepspeed_stage_1", {"stage": 1}),
        ("deepspeed_stage_2_offload", {"stage": 2, "offload_optimizer": "cpu"}),
        ("deepspeed_stage_3", {"stage": 3}),
    ],
)
def test_lightnings_names_are_understood(preset: str, options: Mapping[str, Any]) -> None:
    plan = Trainer(strategy=preset, barebones=True).plan

    assert plan.strategy is not None
    assert plan.strategy.options == DeepSpeedOptions(**options)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_plan_says_what_the_engine_is_told(limit: float | None) -> None:
    plan = Trainer(strategy="deepspeed", gradient_clip_val=limit, barebones=True).plan

    said = " ".join(plan.explain().split())
    clips = "clips gradients at the norm 0.5" if limit else "does not clip gradients"
    assert f"the engine {clips}" in said
    assert "a parameter without gradient in a step still decays" in said


def test_in_pieces_from_the_start_needs_stage_3() -> None:
    plan = Trainer(strategy=use("deepspeed", stage=2, zero_init=True), barebones=True).plan

    (problem,) = plan.problems
    assert problem.code == "TW103"
    assert "zero_init=True with stage=2" in problem.why
    assert "take stage=3" in problem.why


# ---- memory --------------------------------------------------------------------------------------


def held(case: Case, step: Step) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that the strategy foretells, and those that are there after a step."""
    shapes = parameter_shapes(case.make_model())
    with prepared(case) as session:
        session.take(step)
        slots = slots_of(session.prepared.optimizer)
        foretold = session.strategy.estimate(shapes, slots, session.env.world_size, case.settings)
        return dict(foretold), dict(session.prepared.bytes_per_rank())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_found_bytes_are_those_of_the_estimate(strategy: str, world_size: int) -> None:
    bench = bench_of(strategy, world_size)
    for model in ("mlp", "frozen"):
        case = case_of(bench, model)

        for foretold, found in bench.run(held, case, steps_of(model)[0]):
            assert foretold["optimizer"] > 0
            # Adam's counters, of one number each.
            assert found["optimizer"] - foretold["optimizer"] <= 8
            assert {**found, "optimizer": 0} == {**foretold, "optimizer": 0}


# ---- refused while it runs -----------------------------------------------------------------------


class Freezes:
    """Freezes a layer in the middle of training, as a callback of the user's may."""

    def next_due(self, progress: Any) -> int:
        return int(progress.step) + 1

    def at(self, border: Any, run: Any) -> None:
        if border.progress.step == 2:
            next(iter(run.model.named_parameters()))[1].requires_grad_(False)


def fit(stage: int, **flags: Any) -> str:
    trainer = Trainer(
        strategy=use("deepspeed", stage=stage),
        data=use("torch", batch_size=4, shuffle=False),
        enable_checkpointing=False,
        logger=False,
        max_epochs=1,
        **flags,
    )
    data = TensorDataset(*models.features(40))
    try:
        trainer.fit(models.mlp(), data, loss=F.cross_entropy, optimizer=partial(AdamW, lr=1e-2))
    except TorchweldError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_freezing_in_mid_run_is_an_error_that_names_the_parameter(stage: int) -> None:
    (said,) = run_ranks(partial(fit, callbacks=[Freezes()]), 1, stage, timeout_seconds=SECONDS)

    assert "0.weight" in said
    assert "frozen" in said


def test_clipping_by_value_is_refused() -> None:
    job = partial(fit, gradient_clip_val=1.0, gradient_clip_algorithm="value")

    (said,) = run_ranks(job, 1, 2, timeout_seconds=SECONDS)

    assert "DeepSpeed clips by norm only" in said


def test_the_component_is_what_the_plugin_offers() -> None:
    assert DEEPSPEED.options is DeepSpeedOptions


def test_batchnorm_is_refused_where_parameters_are_cast() -> None:
    """DeepSpeed leaves its statistics in fp32, and the layer fails in its first forward."""

    def forbidden(precision: Any) -> list[str]:
        claims = deepspeed_claims(DeepSpeedOptions(), Settings(precision=precision))
        assert isinstance(claims.forbids, tuple)
        return [rule.target for rule in claims.forbids]

    assert forbidden("bf16-true") == ["model.batchnorm"]
    assert forbidden("bf16") == []


# ---- channels-last weights -----------------------------------------------------------------------


def notes_of(case: Case) -> list[str]:
    with prepared(case) as session:
        return list(session.prepared.notes)


def test_deepspeed_fails_on_channels_last_weights() -> None:
    training = training_of("convnet", make_model=channels_last_convnet)

    with pytest.raises(RanksFailed, match=r"self\.stride\(-1\) must be 1 to view"):
        run_ranks(by_engine, 2, training, told(2), timeout_seconds=SECONDS)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_channels_last_weights_are_made_contiguous_and_it_is_said(stage: int) -> None:
    case = case_of(bench_of(f"zero{stage}", 2), "convnet")
    case = replace(case, make_model=channels_last_convnet)

    for notes in run_ranks(notes_of, 2, case, timeout_seconds=SECONDS):
        assert any("2 weights in another memory format were made contiguous" in n for n in notes)


def test_channels_last_weights_train_as_by_hand() -> None:
    training = training_of("convnet", make_model=channels_last_convnet)

    found = run_ranks(by_zero, 2, training, {"stage": 2}, timeout_seconds=SECONDS)
    expected = run_ranks(by_hand, 2, training, timeout_seconds=SECONDS)

    for one, other in zip(found, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-5)


# ---- BatchNorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronised", [False, True])
def test_what_batchnorm_sees_is_said_as_it_is(synchronised: bool) -> None:
    claims = deepspeed_claims(DeepSpeedOptions(), Settings(sync_batchnorm=synchronised))

    said = [what for what, _ in claims.settles]
    assert any("each process's own batch" in what for what in said) is not synchronised
    assert any("checkpoints take rank 0's buffers" in what for what in said)

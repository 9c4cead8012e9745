"""What DeepSpeed does without a word: each fault on its own engine, and that it is gone here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

from tests.deepspeed.runs import (
    SECONDS,
    Trained,
    Training,
    bench_of,
    branching,
    by_engine,
    by_hand,
    by_zero,
    case_of,
    decays_matrices,
    initialized,
    steps_of,
    told,
    training_of,
)
from torchweld import Trainer, use
from torchweld.components import Settings
from torchweld.interfaces import SetupRequest
from torchweld.model.parameters import make_groups
from torchweld.processes.ranks import launch
from torchweld.testing import models, run_ranks
from torchweld.testing.processes import RanksFailed
from torchweld.testing.states import assemble, keep
from torchweld.testing.strategy_session import prepared
from torchweld_deepspeed import DeepSpeedOptions
from torchweld_deepspeed.config import make_config
from torchweld_deepspeed.engine import make_engine
from torchweld_deepspeed.imports import deepspeed_at_work, deepspeed_module

PLAIN_SGD = partial(SGD, lr=1.0)


def zero(training: Training, world_size: int = 2, **options: Any) -> list[Trained]:
    found: list[Trained] = run_ranks(
        by_zero, world_size, training, options, timeout_seconds=SECONDS
    )
    return found


def raw(training: Training, config: Mapping[str, Any], world_size: int = 2) -> list[Trained]:
    found: list[Trained] = run_ranks(
        by_engine, world_size, training, config, timeout_seconds=SECONDS
    )
    return found


def hand(training: Training, **changes: Any) -> list[Trained]:
    job = partial(by_hand, **changes)
    found: list[Trained] = run_ranks(job, 2, training, timeout_seconds=SECONDS)
    return found


def apart(found: list[Trained], expected: list[Trained]) -> float:
    """Largest difference of a loss."""
    pairs = zip(found, expected, strict=True)
    return max(
        abs(a - b) for one, other in pairs for a, b in zip(one.losses, other.losses, strict=True)
    )


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "offload"), [(3, None), (1, "cpu"), (2, "cpu"), (3, "cpu")])
def test_deepspeed_steps_an_unused_parameter_by_its_last_gradient(
    stage: int, offload: str | None
) -> None:
    training = Training(**{**vars(branching()), "clip": None})
    zeros = {"offload_optimizer": {"device": offload}} if offload else {}

    found = raw(training, told(stage, stage3_param_persistence_threshold=0, **zeros))

    # Gone here: test_parity.py, test_a_parameter_without_gradient_is_stepped_with_zeros.
    assert apart(found, hand(training, zeros=True)) >= 1e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_clips_at_one_where_nothing_is_said(stage: int) -> None:
    training = training_of("mlp", clip=None, optimizer=PLAIN_SGD, steps=loud_steps())
    expected = hand(training)
    config = told(stage)
    del config["gradient_clipping"]

    assert apart(raw(training, config), expected) >= 1e-2
    assert apart(zero(training, stage=stage), expected) <= 1e-5


def loud_steps() -> tuple[Any, ...]:
    """A rate so large that the gradient norm comes above 1."""
    return tuple(steps_of("mlp", (1,) * 4, lr=4.0))


def test_deepspeed_exchanges_gradients_of_autocast_in_bf16() -> None:
    training = training_of("mlp", clip=None, precision="bf16")
    expected = hand(training)
    config = {**told(2), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}

    assert apart(raw(training, config), expected) >= 1e-5
    assert apart(zero(training, stage=2), expected) <= 1e-6


def dtypes_of_a_second_engine(repairs: bool) -> list[str]:
    """In what gradients are exchanged under fp32 communication, after a model's first engine."""
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    model = models.mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    first = {**told(2), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    with deepspeed_at_work(ranks.env, verbose=False) as deepspeed:
        deepspeed.initialize(model=model, optimizer=optimizer, config=first)[0].destroy()
        if not repairs:
            optimizer = SGD(model.parameters(), lr=0.1)
            second = deepspeed.initialize(model=model, optimizer=optimizer, config=told(2))[0]
    if repairs:
        training = replace(training_of("mlp"), make_model=lambda: model)
        second = engine_of(2, training, Settings(precision="bf16"))
    return sorted(str(dtype) for dtype in second.optimizer.ipg_buckets)


def test_deepspeed_exchanges_as_the_engine_before_did() -> None:
    raw, ours = (
        run_ranks(dtypes_of_a_second_engine, 1, repairs, timeout_seconds=SECONDS)[0]
        for repairs in (False, True)
    )

    assert "torch.bfloat16" in raw
    assert ours == ["torch.float32"]


def norm_of_a_step(config: Mapping[str, Any]) -> float:
    """What the engine takes for the norm of the gradients when it clips."""
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    training = training_of("mlp", clip=None)
    engine = initialized(training.make_model(), training, ranks.env, config)
    inputs, targets = models.features(8)
    engine.backward(F.cross_entropy(engine(inputs).float(), targets))
    engine.step()
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return norm


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_clips_gradients_of_fp16_autocast_that_are_scaled_still(stage: int) -> None:
    config = {**told(stage), "torch_autocast": {"enabled": True, "dtype": "float16"}}

    (plain,) = run_ranks(norm_of_a_step, 1, told(stage), timeout_seconds=SECONDS)
    (scaled,) = run_ranks(norm_of_a_step, 1, config, timeout_seconds=SECONDS)

    # Refused here: test_bad_input.py, "autocast to fp16". Infinite where 65536 times are too much.
    assert scaled > 1000 * plain


def overflowing(stage: int) -> tuple[bool, bool]:
    """Whether a step with gradients that are not finite is told as applied, and moves something."""
    case = case_of(bench_of(f"zero{stage}", 2), "mlp")
    (step,) = steps_of("mlp", (1,))
    with prepared(case) as session:
        before = keep(session.prepared.shards())
        session.prepared.backward(session.loss(step.window[0]) * float("inf"))
        applied = session.prepared.step()
        after = keep(session.prepared.shards())
    return applied, any(not a.local.equal(b.local) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_deepspeed_leaves_out_is_told(stage: int) -> None:
    assert run_ranks(overflowing, 2, stage, timeout_seconds=SECONDS) == [(False, False)] * 2


# ---- memory --------------------------------------------------------------------------------------


def bucket_elements(config: Mapping[str, Any] | None, stage: int) -> int:
    """Elements of the bucket that DeepSpeed keeps for a small model."""
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    training = training_of("mlp")
    assert config is not None
    engine = initialized(training.make_model(), training, ranks.env, config)
    size = engine.optimizer.reduce_bucket_size
    engine.destroy()
    return int(size)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_takes_buckets_of_2000_megabytes(stage: int) -> None:
    config = {**told(stage), "zero_optimization": {"stage": stage}}

    (elements,) = run_ranks(bucket_elements, 1, config, stage, timeout_seconds=SECONDS)

    assert elements * 4 == 2_000_000_000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_holds_no_more_than_is_trained(stage: int) -> None:
    trained = sum(p.numel() for p in models.mlp().parameters())

    (elements,) = run_ranks(our_bucket_elements, 1, stage, timeout_seconds=SECONDS)

    assert trained <= elements <= trained + 1


def our_bucket_elements(stage: Any) -> int:
    return int(engine_of(stage).optimizer.reduce_bucket_size)


def engine_of(
    stage: Any, training: Training | None = None, settings: Settings | None = None
) -> Any:
    """The engine that the strategy makes, on the ranks of this launch."""
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    training = training or training_of("mlp")
    model = training.make_model()
    groups = make_groups(model, training.rule)
    settings = settings or Settings()
    request = SetupRequest(groups, training.optimizer, (), (), ranks.env, settings)
    config = make_config(DeepSpeedOptions(stage=stage), settings, ranks.env, None)
    return make_engine(model, request, config, verbose=False).engine


# ---- groups --------------------------------------------------------------------------------------


def freezes_biases(_name: str, _module: nn.Module, parameter: nn.Parameter) -> Mapping[str, object]:
    """Groups of which one has nothing to train."""
    parameter.requires_grad_(parameter.ndim > 1)
    return decays_matrices(_name, _module, parameter)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_fails_on_a_group_with_nothing_to_train(stage: int) -> None:
    training = training_of("mlp", rule=freezes_biases, clip=None)

    with pytest.raises(RanksFailed, match="IndexError"):
        raw(training, told(stage), world_size=1)

    assert apart(zero(training, stage=stage), hand(training)) <= 2e-6


def accessor_of_second_group() -> str:
    """What DeepSpeed says of the optimizer state of a bias after a step."""
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    training = training_of("mlp", rule=decays_matrices)
    model = training.make_model()
    engine = initialized(model, training, ranks.env, told(1))
    inputs, targets = models.features(4)
    engine.backward(F.cross_entropy(engine(inputs), targets))
    engine.step()
    get = deepspeed_module("deepspeed.utils").safe_get_full_optimizer_state
    try:
        get(next(p for p in model.parameters() if p.ndim == 1), "exp_avg")
    except ValueError as error:
        return str(error)
    return "found"


def test_deepspeed_does_not_find_the_state_of_a_second_group() -> None:
    # Found here: test_state.py, test_groups_keep_their_state.
    assert "not found" in run_ranks(accessor_of_second_group, 1, timeout_seconds=SECONDS)[0]


# ---- freezing ------------------------------------------------------------------------------------


def moved_while_frozen(stage: int) -> float:
    """How far three steps move a weight that was frozen after the engine had been made."""
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    training = training_of("mlp")
    model = training.make_model()
    engine = initialized(model, training, ranks.env, told(stage))
    weight = next(model.parameters())
    inputs, targets = models.features(8)
    seen = []
    for step in range(4):
        engine.backward(F.cross_entropy(engine(inputs), targets))
        engine.step()
        weight.requires_grad_(False)
        if step in (0, 3):
            seen.append(getattr(weight, "ds_tensor", weight).detach().clone())
    engine.destroy()
    return float((seen[1] - seen[0]).abs().max())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_moves_what_is_frozen_after_set_up(stage: int) -> None:
    # Refused here: test_claims.py, test_freezing_in_mid_run_is_an_error_that_names_the_parameter.
    assert run_ranks(moved_while_frozen, 1, stage, timeout_seconds=SECONDS)[0] >= 1e-3


# ---- the process ---------------------------------------------------------------------------------


def linear_is_torchs(stage: int, told_by_us: bool) -> bool:
    """Whether the function is the same after set-up; another one is put back."""
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    training, linear = training_of("mlp"), F.linear
    if told_by_us:
        engine_of(stage)
        return F.linear is linear
    model = training.make_model()
    optimizer = training.optimizer(model.parameters())
    with deepspeed_at_work(ranks.env, verbose=False) as deepspeed:
        deepspeed.initialize(model=model, optimizer=optimizer, config=told(stage))
        return F.linear is linear  # what set it back comes after


def test_deepspeed_replaces_linear_for_the_whole_process() -> None:
    assert run_ranks(linear_is_torchs, 1, 3, False, timeout_seconds=SECONDS) == [False]
    assert run_ranks(linear_is_torchs, 1, 3, True, timeout_seconds=SECONDS) == [True]


def numbered_apart(agrees: bool) -> str:
    """Train a step at stage 3 after one rank has met other models."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))  # the other rank would wait
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    modules = deepspeed_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
    (count,) = modules._register_deepspeed_module.__defaults__
    training = training_of("mlp")
    model = training.make_model()
    groups = [{"params": list(model.parameters())}]
    if agrees:
        count[0] += 3 * ranks.rank
    with deepspeed_at_work(ranks.env, verbose=False) as deepspeed:
        if not agrees:
            count[0] += 3 * ranks.rank
        engine = deepspeed.initialize(
            model=model, optimizer=training.optimizer(groups), config=told(3)
        )[0]
    inputs, targets = models.features(4)
    try:
        for _ in range(2):
            engine.backward(F.cross_entropy(engine(inputs), targets))
            engine.step()
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_deepspeed_ends_a_run_when_a_rank_has_had_another_model() -> None:
    alone = run_ranks(numbered_apart, 2, False, timeout_seconds=SECONDS)
    agreed = run_ranks(numbered_apart, 2, True, timeout_seconds=SECONDS)

    assert any("disagreement" in text for text in alone)
    assert agreed == ["trained", "trained"]


def linear_during_and_after() -> tuple[bool, bool]:
    """Whether it is torch's while a configuration replaces it, and after the run."""
    linear = F.linear
    config = {"zero_optimization": {"stage": 3, "memory_efficient_linear": True}}
    with prepared(case_of(bench_of("zero3", 1, config=config), "mlp")):
        during = F.linear is linear
    return during, F.linear is linear


def test_a_linear_that_a_configuration_replaces_is_put_back_when_the_run_ends() -> None:
    assert run_ranks(linear_during_and_after, 1, timeout_seconds=SECONDS) == [(False, True)]


# ---- stage 0 -------------------------------------------------------------------------------------


def hidden_step() -> tuple[float, float]:
    """Adam's step counter, and a master weight over the weight, before any batch."""
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    optimizer = partial(AdamW, lr=0.5, weight_decay=0.5)
    training = training_of("mlp", optimizer=optimizer)
    model: Any = training.make_model()
    before = model[0].weight.detach().clone()
    config = {**told(0), "bf16": {"enabled": True}}
    engine = initialized(model, training, ranks.env, config)
    inner = engine.optimizer.optimizer
    master = next(p for g in inner.param_groups for p in g["params"] if p.shape == before.shape)
    return float(inner.state[master]["step"]), float(master.norm() / before.norm())


def test_deepspeed_takes_a_step_before_the_first_batch_at_stage_0() -> None:
    ((steps, shrunk),) = run_ranks(hidden_step, 1, timeout_seconds=SECONDS)

    assert (steps, round(shrunk, 2)) == (1.0, 0.75)


def test_stage_0_is_refused_with_the_reason() -> None:
    plan = Trainer(strategy=use("deepspeed", stage=0), barebones=True).plan

    (problem,) = plan.problems

    assert problem.code == "TW103"
    assert "takes a step before the first batch: choose strategy='ddp'" in problem.why


# ---- what raises on one rank only ----------------------------------------------------------------


def state_before_the_first_step() -> None:
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    training = training_of("mlp")
    model = training.make_model()
    initialized(model, training, ranks.env, told(1))
    get = deepspeed_module("deepspeed.utils").safe_get_full_optimizer_state
    *_, last = model.parameters()  # a piece of the last rank alone
    get(last, "exp_avg")


def test_deepspeeds_accessors_fail_on_the_owner_alone() -> None:
    with pytest.raises(RanksFailed) as raised:
        run_ranks(state_before_the_first_step, 2, timeout_seconds=SECONDS)

    owner, other = raised.value.failures
    assert (owner.rank, type(owner.error)) == (1, TypeError)
    # It waits for the owner's part of the sum, and was ended.
    assert (other.rank, "still running" in other.message) == (0, True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_state_can_be_read_before_the_first_step(stage: int) -> None:
    training = training_of("mlp", steps=())

    found = assemble([one.state for one in zero(training, stage=stage)])

    assert found.keys() == {f"model/{name}" for name, _ in models.mlp().named_parameters()}

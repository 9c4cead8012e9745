"""What OSS and ShardedDDP cannot do is refused or said; controls show what would happen."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Optimizer

from tests.fsdp.fairscale_runs import (
    Training,
    Weights,
    by_hand,
    difference,
    make_session,
    raw_oss,
    through_torchweld,
)
from torchweld import Trainer
from torchweld.components import Component, Settings
from torchweld.testing import RanksFailed, models, run_ranks
from torchweld.testing.registry import empty_registry
from torchweld.testing.strategy_bench import channels_last_convnet
from torchweld_fsdp.fairscale.components import FAIRSCALE_OSS, FAIRSCALE_SDP
from torchweld_fsdp.fairscale.imports import fairscale_module

BOTH = pytest.mark.parametrize("component", [FAIRSCALE_OSS, FAIRSCALE_SDP], ids=lambda c: c.name)


def refuse(component: Component, training: Training, words: str) -> None:
    with pytest.raises(RanksFailed, match=words):
        run_ranks(through_torchweld, 2, training, component)


# ---- weights that are no longer in OSS's buffers ---------------------------------------------


def _raw_rebound() -> Weights:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = models.mlp()
    oss = fairscale_module("fairscale.optim").OSS(model.parameters(), optim=SGD, lr=0.1)
    wrapped = DistributedDataParallel(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    inputs, targets = models.features(4, seed=dist.get_rank())
    torch.autograd.backward(F.cross_entropy(wrapped(inputs), targets))
    oss.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def test_raw_oss_lets_ranks_drift_when_a_weight_gets_another_tensor() -> None:
    first, second = run_ranks(_raw_rebound, 2)

    assert difference(first, second) > 1e-3


def _given_another_tensor(component: Component) -> None:
    session = make_session(Training(), component)
    inputs, targets = models.features(8)
    session.prepared.backward(F.cross_entropy(session.prepared.forward(inputs), targets))
    session.prepared.step()
    parameter = next(session.model.parameters())
    parameter.data = parameter.data.clone()
    session.state()


@BOTH
def test_a_weight_with_another_tensor_is_named_at_the_next_checkpoint(component: Component) -> None:
    with pytest.raises(RanksFailed, match=r"'0\.weight' was given another tensor after set-up"):
        run_ranks(_given_another_tensor, 2, component)


def _strides(component: Component | None) -> tuple[list[bool], list[str]]:
    training = Training(make_model=channels_last_convnet, make_data=models.images, steps=1)
    if component is None:
        dist.init_process_group("gloo")
        model = channels_last_convnet()
        fairscale_module("fairscale.optim").OSS(model.parameters(), optim=SGD, lr=0.1)
        return [p.is_contiguous() for p in model.parameters()], []
    session = make_session(training, component)
    inputs, targets = models.images(8)
    session.prepared.backward(F.cross_entropy(session.prepared.forward(inputs), targets))
    session.prepared.step()
    return [p.is_contiguous() for p in session.model.parameters()], list(session.prepared.notes)


def test_raw_oss_undoes_channels_last_weights_silently() -> None:
    assert not all(p.is_contiguous() for p in channels_last_convnet().parameters())

    contiguous, _ = run_ranks(_strides, 1, None)[0]

    assert all(contiguous)


@BOTH
def test_channels_last_weights_are_undone_and_said(component: Component) -> None:
    for contiguous, notes in run_ranks(_strides, 2, component):
        assert all(contiguous)
        assert notes == [
            "2 parameters (0.weight, …) were made contiguous: OSS keeps them in flat buffers"
        ]


# ---- optimizers whose step cannot be shared out ----------------------------------------------


def line_search(groups: Any) -> LBFGS:
    return LBFGS(groups, lr=0.1, max_iter=4)


def _lbfgs(raw: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = models.mlp()
    if raw:
        dist.init_process_group("gloo")
        optimizer = fairscale_module("fairscale.optim").OSS(model.parameters(), optim=line_search)
    else:
        optimizer = line_search(model.parameters())
    inputs, targets = models.features(8)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        torch.autograd.backward(loss)
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return {n: p.detach() for n, p in model.named_parameters()}


def test_raw_oss_makes_another_optimizer_of_lbfgs() -> None:
    ranks = run_ranks(_lbfgs, 2, True)

    assert difference(ranks[0], _lbfgs(False)) > 1e-3


@BOTH
def test_lbfgs_is_refused(component: Component) -> None:
    refuse(component, Training(optimizer=line_search), "LBFGS evaluates the loss between moves")


def biases_fast(name: str, _module: nn.Module, _parameter: nn.Parameter) -> dict[str, object]:
    return {"lr": 0.5} if name.endswith("bias") else {}


def one_group(groups: Any) -> Optimizer:
    return SGD([p for group in groups for p in group["params"]], lr=0.1)


def test_raw_oss_loses_the_learning_rates_of_groups_that_the_factory_merges() -> None:
    merged = run_ranks(raw_oss, 2, Training(groups=biases_fast, optimizer=one_group))

    expected = by_hand(Training(groups=biases_fast, optimizer=partial(SGD, lr=0.1)))
    assert difference(merged[0].weights, expected.weights) > 1e-3


@BOTH
def test_a_factory_that_merges_groups_is_refused(component: Component) -> None:
    training = Training(groups=biases_fast, optimizer=one_group)

    refuse(component, training, "SGD was made of 2 parameter groups and has 1")


def half_double() -> nn.Module:
    model = models.mlp()
    model.get_submodule("2").double()
    return model


@BOTH
def test_parameters_of_two_dtypes_are_refused_by_name(component: Component) -> None:
    words = "'0.bias' is torch.float32, '2.bias' is torch.float64"

    refuse(component, Training(make_model=half_double), words)


class Lookahead:
    """An optimizer wrapper with a state of its own."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, dict[Any, Any]()
        self.step, self.zero_grad = inner.step, inner.zero_grad


@BOTH
def test_a_wrapper_with_a_state_of_its_own_is_refused(component: Component) -> None:
    with pytest.raises(RanksFailed, match="the optimizer wrapper Lookahead keeps a state of its"):
        run_ranks(make_session, 2, Training(wrappers=(Lookahead,)), component)


# ---- claims that are not made, and what would happen -----------------------------------------


def _unfrozen(component: Component, options: dict[str, Any]) -> Weights:
    session = make_session(Training(models.frozen_mlp), component, options)
    for step in range(4):
        for _, parameter in session.prepared.named_parameters():
            parameter.requires_grad_(step >= 2 or parameter.requires_grad)
        session.prepared.backward(session.loss(models.features(8, seed=step)))
        session.prepared.step()
    return {n: p.detach() for n, p in session.model.named_parameters()}


@pytest.mark.parametrize(
    ("component", "options"),
    [
        (FAIRSCALE_OSS, {"find_unused_parameters": True}),
        (FAIRSCALE_SDP, {"auto_refresh_trainable": False}),
    ],
)
def test_ranks_drift_when_a_layer_is_unfrozen_where_that_is_not_claimed(
    component: Component, options: dict[str, Any]
) -> None:
    first, second = run_ranks(_unfrozen, 2, component, options)

    assert difference(first, second) > 1e-2
    assert "params.may_unfreeze" not in provided(component, options)


def test_sdp_ends_where_ranks_skip_different_layers() -> None:
    assert "graph.per_rank" not in provided(FAIRSCALE_SDP)

    with pytest.raises(RanksFailed):
        run_ranks(_branch_of_rank_0, 2)


def _branch_of_rank_0() -> None:
    session = make_session(Training(models.Branching), FAIRSCALE_SDP)
    for step in range(3):
        here = session.env.rank == 0
        session.prepared.backward(session.loss(models.features(8, seed=step), branch=here))
        session.prepared.step()


def test_sdp_leaves_a_gradient_on_the_rank_that_steps_it_alone() -> None:
    assert not {"grads.whole", "grads.elementwise"} & provided(FAIRSCALE_SDP)

    first, second = run_ranks(_have_gradients, 2)

    assert [a + b for a, b in zip(first, second, strict=True)] == [1, 1, 1, 1]


def _have_gradients() -> list[int]:
    session = make_session(Training(), FAIRSCALE_SDP)
    session.prepared.backward(session.loss(models.features(8)))
    return [int(p.grad is not None) for p in session.model.parameters()]


def provided(component: Component, options: dict[str, Any] | None = None) -> set[str]:
    assert component.options is not None
    assert callable(component.claims)
    return set(component.claims(component.options(**(options or {})), Settings()).provides)


# ---- what a plan refuses or adjusts ----------------------------------------------------------


def plan(component: Component, **settings: Any) -> Any:
    registry = empty_registry(strategies=[component])
    return Trainer(strategy=component.name, registry=registry, **settings).plan


def test_fp16_is_refused_under_sdp_with_the_reason() -> None:
    problems = plan(FAIRSCALE_SDP, precision="16", accelerator="cuda").problems

    assert [p.code for p in problems] == ["TW302"]
    assert "then skips a step alone" in problems[0].why


def _overflow() -> float:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = models.mlp()
    oss = fairscale_module("fairscale.optim").OSS(model.parameters(), optim=SGD, lr=0.1)
    wrap = fairscale_module("fairscale.nn.data_parallel").ShardedDataParallel
    wrapped = wrap(model, oss, reduce_buffer_size=0)
    scaler = torch.amp.GradScaler("cpu")
    inputs, targets = models.features(4)
    torch.autograd.backward(scaler.scale(F.cross_entropy(wrapped(inputs), targets)))
    gradient = model.get_parameter("2.bias").grad
    if gradient is not None:
        gradient.fill_(float("inf"))
    scaler.unscale_(oss)
    found = scaler._per_optimizer_states[id(oss)]["found_inf_per_device"]
    return float(sum(found.values()))


def test_torchs_loss_scaling_under_sdp_sees_an_overflow_on_its_owner_alone() -> None:
    assert sorted(run_ranks(_overflow, 2)) == [0.0, 1.0]

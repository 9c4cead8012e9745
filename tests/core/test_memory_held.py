"""What a run holds is what was predicted, or both are said."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, RMSprop

from tests.core.small_runs import OPTIMIZERS, quiet_trainer
from tests.core.small_runs import fit as fit_small
from tests.core.trainings import make_loader
from torchweld import Claims, Component, Settings, Trainer
from torchweld.errors import PluginError
from torchweld.interfaces import ParameterShape, Prepared, SetupRequest
from torchweld.setup.memory import memory_line, parameter_shapes, slots_of
from torchweld.strategies.replicated import estimate_replicated
from torchweld.strategies.single import SingleStrategy
from torchweld.testing import empty_registry, run_ranks


def net(*, frozen: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 700), nn.ReLU(), nn.Linear(700, 30), nn.Linear(30, 3))
    model[2].requires_grad_(not frozen)
    return model


def tied_net() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 90), *(nn.Linear(90, 90) for _ in range(2)))
    model[2].weight = model[1].weight
    return nn.Sequential(model, nn.Linear(90, 3))


FACTORIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "adamw": partial(AdamW, lr=0.01),
    "amsgrad": partial(Adam, lr=0.01, amsgrad=True),
    "rmsprop": partial(RMSprop, lr=0.01, centered=True),
}


def speaking(**settings: Any) -> Trainer:
    given: dict[str, Any] = {
        "enable_checkpointing": False,
        "logger": False,
        "enable_progress_bar": False,
        "registry": empty_registry(),
    }
    return Trainer(**{**given, **settings})


def fit(trainer: Trainer, model: nn.Module, optimizer: Any) -> None:
    trainer.fit(model, make_loader(), loss=F.cross_entropy, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", FACTORIES)
@pytest.mark.parametrize("make", [net, partial(net, frozen=True), tied_net])
@pytest.mark.parametrize("precision", ["32", "bf16-true"])
def test_the_estimate_is_what_single_holds(optimizer: str, make: Any, precision: Any) -> None:
    model = make()
    shapes = parameter_shapes(model)
    trainer = speaking(precision=precision)

    fit(trainer, model, FACTORIES[optimizer])

    prepared = trainer._run.wiring.prepared  # type: ignore[union-attr]  # it was trained
    slots = slots_of(prepared.optimizer)
    predicted = SingleStrategy().estimate(shapes, slots, 1, Settings(precision=precision))
    found = prepared.bytes_per_rank()
    assert {k: found[k] for k in ("parameters", "gradients")} == {
        k: predicted[k] for k in ("parameters", "gradients")
    }
    assert found["optimizer"] == pytest.approx(predicted["optimizer"], rel=0.01, abs=64)


def test_an_estimate_that_knew_of_no_frozen_parameters_would_be_wrong() -> None:
    shapes = parameter_shapes(net(frozen=True))
    blind = {n: ParameterShape(one.shape, one.dtype) for n, one in shapes.items()}

    right, wrong = (estimate_replicated(known, 2, Settings()) for known in (shapes, blind))

    assert wrong["optimizer"] > 3 * right["optimizer"]


def test_a_run_says_once_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    fit(speaking(max_epochs=3, log_every_n_steps=1), net(), FACTORIES["adamw"])

    (line,) = (line for line in capsys.readouterr().out.splitlines() if "memory" in line)
    assert line == (
        "memory: 101.3 kB parameters + 202.6 kB optimizer state on this rank "
        "(predicted 303.9 kB, found 303.9 kB)"
    )


def test_a_difference_is_said_with_both_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    # Adagrad keeps state for frozen parameters, too.
    fit(speaking(), net(frozen=True), partial(Adagrad, lr=0.1))

    said = re.search(r"memory: .*: (\S+) kB found, (\S+) kB predicted", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) > 1.05 * float(said[2])


def test_small_differences_are_no_difference() -> None:
    predicted = {"parameters": 1000, "optimizer": 1000}

    near = memory_line([{"parameters": 1000, "optimizer": 1100}], predicted)
    far = memory_line([{"parameters": 1000, "optimizer": 1101}], predicted)

    assert near.endswith("(predicted 2.0 kB, found 2.1 kB)")
    assert "2.1 kB found, 2.0 kB predicted" in far


def test_the_fullest_rank_is_the_one_that_is_compared() -> None:
    ranks = [{"parameters": 1000, "optimizer": 10}, {"parameters": 1000, "optimizer": 1000}]

    line = memory_line(ranks, {"parameters": 1000, "optimizer": 1000})

    assert line == (
        "memory: 1.0 kB parameters + 1.0 kB optimizer state on rank 1 "
        "(predicted 2.0 kB, found 2.0 kB)"
    )


@pytest.mark.parametrize("settings", [{"enable_model_summary": False}, {"barebones": True}])
def test_it_can_be_left_out(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"registry": empty_registry(), **settings}
    given |= {} if "barebones" in settings else {"enable_checkpointing": False, "logger": False}

    fit(Trainer(**given), net(), FACTORIES["adamw"])

    assert "memory:" not in capsys.readouterr().out


def test_nothing_is_said_of_an_optimizer_with_a_history(capsys: pytest.CaptureFixture[str]) -> None:
    fit(speaking(), net(), partial(LBFGS, lr=0.1, max_iter=2))

    assert "memory:" not in capsys.readouterr().out


def test_a_resumed_run_says_it_at_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_small(quiet_trainer(tmp_path, max_epochs=1), optimizer="adamw")

    trainer = quiet_trainer(tmp_path, max_epochs=2, enable_model_summary=True, callbacks=[])
    fit_small(trainer, optimizer="adamw", ckpt_path="last")

    assert re.search(r"memory: .*predicted (\S+) kB, found", capsys.readouterr().out)


def test_an_own_loop_says_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["adamw"]}
    with speaking().prepare(net(), make_loader(), **arguments) as run:
        for inputs, targets in run.batches():
            run.backward(run.loss(run.model(inputs), targets))
            run.step()

    assert capsys.readouterr().out.count("memory:") == 1


def as_strategy(build: type) -> Component:
    provides = ("params.writable", "params.may_freeze", "grads.whole")
    return Component("odd", "for a test", build, claims=Claims(provides=provides))


class CannotEstimate(SingleStrategy):
    def estimate(self, *_: Any) -> Mapping[str, int]:
        raise KeyError("shapes")


def test_a_strategy_that_cannot_estimate_says_so_before_step_1() -> None:
    model = net()
    before = model[0].weight.clone()  # type: ignore[index]  # a Sequential

    with pytest.raises(PluginError, match="strategy 'odd' could not be asked for its memory"):
        fit(speaking(strategy=as_strategy(CannotEstimate)), model, FACTORIES["sgd"])
    assert torch.equal(before, model[0].weight)  # type: ignore[index]  # a Sequential


def _fit_on_two(name: str) -> str:
    import contextlib
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        fit(speaking(strategy="ddp"), net(frozen=True), FACTORIES[name])
    return output.getvalue()


def test_ddp_holds_what_was_predicted_and_rank_0_says_so() -> None:
    first, second = run_ranks(_fit_on_two, 2, "adamw")

    assert re.search(r"memory: .* on this rank \(predicted \S+ kB, found \S+ kB\)\n", first)
    assert "memory:" not in second


class Wrapper:
    """Steps another optimizer, which keeps the state; its own is empty."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups = inner, inner.param_groups
        self.state: dict[Any, Any] = {}
        self._advance, self.zero_grad = inner.step, inner.zero_grad

    def step(self) -> None:
        self._advance()


class Hidden(Wrapper):
    """Nor does it let anybody see the other one."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        del self.inner


def test_the_state_of_a_wrapped_optimizer_is_found() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    wrapper = Wrapper(AdamW([weight]))

    wrapper.step()

    assert slots_of(wrapper) == 2


class HidesItsState(SingleStrategy):
    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        prepared = super().setup(model, request)
        assert prepared.optimizer is not None
        hidden: Any = Hidden(prepared.optimizer)
        return replace(prepared, optimizer=hidden)


def test_state_that_cannot_be_seen_is_not_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    fit(speaking(strategy=as_strategy(HidesItsState)), net(), FACTORIES["adamw"])

    output = capsys.readouterr().out
    assert "memory: 101.3 kB parameters + 202.6 kB optimizer state on this rank\n" in output


class CountsNothing(SingleStrategy):
    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        return replace(super().setup(model, request), bytes_per_rank=dict)


def test_a_strategy_that_counts_nothing_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fit(speaking(strategy=as_strategy(CountsNothing)), net(), FACTORIES["sgd"])

    assert "memory:" not in capsys.readouterr().out


def test_without_a_prediction_there_is_what_was_found() -> None:
    assert memory_line([{"parameters": 8}], {}) == (
        "memory: 8 B parameters + 0 B optimizer state on this rank"
    )

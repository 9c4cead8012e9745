"""Schedules: stepped where they should be, and resumed exactly, whichever of torch's it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler

from tests.core.small_runs import BATCH, SEED, different, make_data, make_model, saved, weights
from torchweld import LRSchedule, ModelCheckpoint, Trainer, use
from torchweld.claims import Claims
from torchweld.components import Component, Settings
from torchweld.errors import InvalidArgument
from torchweld.interfaces import Border, Env, Prepared, Run, SetupRequest
from torchweld.model.parameters import make_groups
from torchweld.strategies.optimizing import OptimizerStep
from torchweld.strategies.single import SingleStrategy
from torchweld.testing import empty_registry, run_ranks

# SequentialLR of torch itself calls step(0).
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

S = lr_scheduler
TOTAL = 12  # two epochs of six steps
MIDDLE = 5


def warm_then_cosine(optimizer: Optimizer, total: int) -> S.SequentialLR:
    warm = S.LinearLR(optimizer, 0.1, total_iters=3)
    return S.SequentialLR(optimizer, [warm, S.CosineAnnealingLR(optimizer, total - 3)], [3])


def chained(optimizer: Optimizer, total: int) -> S.ChainedScheduler:
    return S.ChainedScheduler([S.ConstantLR(optimizer, 0.5, 4), S.ExponentialLR(optimizer, 0.9)])


def by(make: Callable[..., Any], *args: Any, **options: Any) -> Callable[[Optimizer, int], Any]:
    return lambda optimizer, _total: make(optimizer, *args, **options)


SCHEDULES: dict[str, Any] = {
    "LambdaLR": by(S.LambdaLR, lambda step: 0.95**step),
    "MultiplicativeLR": by(S.MultiplicativeLR, lambda _step: 0.9),
    "StepLR": by(S.StepLR, 2, 0.7),
    "MultiStepLR": by(S.MultiStepLR, [2, 5, 9], 0.5),
    "ConstantLR": by(S.ConstantLR, 0.3, 7),
    "LinearLR": by(S.LinearLR, 0.1, total_iters=8),
    "ExponentialLR": by(S.ExponentialLR, 0.9),
    "PolynomialLR": by(S.PolynomialLR, TOTAL, 2.0),
    "CosineAnnealingLR": S.CosineAnnealingLR,
    "CosineAnnealingWarmRestarts": by(S.CosineAnnealingWarmRestarts, 4),
    "CyclicLR": by(S.CyclicLR, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda optimizer, total: S.OneCycleLR(optimizer, 0.2, total_steps=total),
    "SequentialLR": warm_then_cosine,
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": LRSchedule(
        by(S.ReduceLROnPlateau, patience=0, threshold=0.9), monitor="train_loss"
    ),
    "by epoch": LRSchedule(by(S.ExponentialLR, 0.5), interval="epoch"),
}


class Rates:
    """Notes learning rate and momentum after each step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[float, float]]] = {}

    def next_due(self, progress: Any) -> int:
        return int(progress.step) + 1

    def at(self, border: Border, run: Run) -> None:
        groups = run.model.optimizer.param_groups if run.model.optimizer else []
        self.seen[border.progress.step] = [(g["lr"], g["momentum"]) for g in groups]


def train(
    root: Path, schedule: Any, ckpt_path: Any = None, **settings: Any
) -> tuple[dict[int, Any], dict[str, torch.Tensor]]:
    rates, model = Rates(), make_model()
    saver = ModelCheckpoint(every_n_train_steps=MIDDLE, save_top_k=-1)
    given: dict[str, Any] = {
        "data": use("torch", batch_size=BATCH), "default_root_dir": root, "max_epochs": 2,
        "callbacks": [rates, saver], "logger": False, "enable_progress_bar": False, "seed": SEED,
        "enable_model_summary": False,
    }  # fmt: skip
    Trainer(**{**given, **settings}).fit(
        model, make_data(), make_data(9), loss=F.cross_entropy, lr_scheduler=schedule,
        optimizer=partial(SGD, lr=0.1, momentum=0.9), ckpt_path=ckpt_path,
    )  # fmt: skip
    return rates.seen, weights(model)


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    found = {
        name
        for name, item in vars(lr_scheduler).items()
        if isinstance(item, type) and issubclass(item, lr_scheduler.LRScheduler)
    }

    assert found - {"LRScheduler", "_LRScheduler"} <= SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_resumes_bitwise(name: str, tmp_path: Path) -> None:
    rates, undisturbed = train(tmp_path / "whole", SCHEDULES[name])
    middle = next(p for p in saved(tmp_path / "whole") if p.name == f"step-{MIDDLE}")

    resumed, ended = train(tmp_path / "resumed", SCHEDULES[name], middle)

    assert resumed == {step: rate for step, rate in rates.items() if step >= MIDDLE}
    assert different(ended, undisturbed) == []
    assert len({str(rate) for rate in rates.values()}) > 1, "it changed nothing"


@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR", "CosineAnnealingLR"])
def test_a_schedule_by_step_gives_the_rates_of_a_loop_by_hand(name: str, tmp_path: Path) -> None:
    optimizer = SGD(make_model().parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULES[name](optimizer, TOTAL)
    expected = {}
    for step in range(TOTAL + 1):
        expected[step] = [(g["lr"], g["momentum"]) for g in optimizer.param_groups]
        optimizer.step()
        if step < TOTAL:
            scheduler.step()

    rates, _ = train(tmp_path, SCHEDULES[name])

    assert rates == expected


def test_a_schedule_by_epoch_is_stepped_at_their_ends_and_counts_them(tmp_path: Path) -> None:
    totals = []

    def halve(optimizer: Optimizer, total: int) -> Any:
        totals.append(total)
        return S.ExponentialLR(optimizer, 0.5)

    rates, _ = train(tmp_path, LRSchedule(halve, interval="epoch"))

    assert [rates[step][0][0] for step in (0, 5, 6, 11, 12)] == [0.1, 0.1, 0.05, 0.05, 0.025]
    assert totals == [2]


class Counting:
    """Stands for a scheduler by a metric: keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, value: float) -> None:
        self.values.append(value)

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("monitor", "settings", "times"),
    [
        ("val_loss", {}, 2),
        ("train_loss", {"check_val_every_n_epoch": 2}, 2),
        ("val_loss", {"check_val_every_n_epoch": 2}, 1),
        ("val_loss", {"val_check_interval": 0.5}, 4),
    ],
)
def test_a_schedule_by_a_metric_is_stepped_when_it_is_measured(
    monitor: str, settings: dict[str, Any], times: int, tmp_path: Path
) -> None:
    counting = Counting()

    train(tmp_path, LRSchedule(lambda *_: counting, monitor=monitor), **settings)

    assert len(counting.values) == times
    assert len(set(counting.values)) == times


def test_plateau_is_made_without_a_number_of_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"patience": 0, "threshold": 0.9}
    given = (partial(S.ReduceLROnPlateau, **options), by(S.ReduceLROnPlateau, **options))

    rates = [train(tmp_path, LRSchedule(one, monitor="val_loss"), max_epochs=4)[0] for one in given]

    assert rates[0] == rates[1]
    assert rates[0][0] != rates[0][max(rates[0])]


def test_a_metric_that_is_never_measured_is_refused(tmp_path: Path) -> None:
    schedule = LRSchedule(by(S.ReduceLROnPlateau), monitor="val_loss")

    with pytest.raises(InvalidArgument, match="this run never validates; give val="):
        train(tmp_path, schedule, check_val_every_n_epoch=None)


def plateau_rates(root: Path) -> Any:
    schedule = LRSchedule(by(S.ReduceLROnPlateau, patience=0, threshold=0.5), monitor="val_loss")
    return train(root, schedule, strategy="ddp", max_epochs=4)[0]


def test_two_processes_lower_the_rate_alike(tmp_path: Path) -> None:
    first, second = run_ranks(plateau_rates, 2, tmp_path)

    assert first == second
    assert first[max(first)] != first[0]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (by(S.ReduceLROnPlateau), "monitor='val_loss'"),
        (S.ReduceLROnPlateau, "LRSchedule.*monitor='val_loss'"),
        (partial(S.ReduceLROnPlateau, patience=3), "LRSchedule.*monitor='val_loss'"),
        (S.ReduceLROnPlateau(SGD([torch.ones(1)])), r"\(…\) belongs to .* LRSchedule.*val_loss"),
        (LRSchedule(by(S.ReduceLROnPlateau), monitor="val_los"), "no such metric.*mean 'val_loss'"),
        (lambda: None, "it is called with"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(schedule: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=words):
        train(tmp_path, schedule)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"interval": "batch"}, "choose 'step' or 'epoch'"),
        ({"interval": "step", "monitor": "val_loss"}, "leave interval out"),
    ],
)
def test_an_interval_that_cannot_work_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        LRSchedule(by(S.StepLR, 3), **given)


# ---- a step that fp16 skipped --------------------------------------------------------------------


def cpu_scaler() -> Any:
    """Torch's own scaler works on the CPU too."""
    return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)


def scaled_step(model: nn.Module) -> tuple[OptimizerStep, Any]:
    request = SetupRequest(
        groups=make_groups(model, None), optimizer=partial(SGD, lr=0.1), optimizer_wrappers=(),
        grad_transforms=(), env=Env(0, 1, 0, torch.device("cpu")), settings=Settings(),
    )  # fmt: skip
    scaler = cpu_scaler()
    return OptimizerStep(model, request, scaler=scaler), scaler


def test_a_step_that_the_scaler_skips_says_so_and_one_that_it_makes_too() -> None:
    model = nn.Linear(3, 1)
    step, scaler = scaled_step(model)
    bound, made = step.bind(), []
    for factor in (1.0, float("inf"), 1.0, float("nan"), 1.0):
        before = weights(model)
        scaler.scale(model(torch.ones(2, 3)).mean() * factor).backward()
        made.append((bound(), bool(different(before, weights(model)))))

    assert made == [(True, True), (False, False), (True, True), (False, False), (True, True)]


class ScaledSingle(SingleStrategy):
    """``single`` with the scaler of fp16, which overflows in steps 2 and 4."""

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        scaler, count = cpu_scaler(), iter(range(1, 100))
        step = OptimizerStep(model, request, scaler=scaler)

        def backward(loss: torch.Tensor) -> None:
            scaler.scale(loss * (float("inf") if next(count) in {2, 4} else 1.0)).backward()

        prepared = super().setup(model, request)
        return replace(prepared, optimizer=step.optimizer, step=step.bind(), backward=backward)


def test_a_skipped_step_does_not_advance_the_schedule(tmp_path: Path) -> None:
    scaled = Component("scaled", "a test", ScaledSingle, claims=Claims(provides="params.writable"))

    rates, _ = train(
        tmp_path, SCHEDULES["ExponentialLR"], strategy="scaled", max_epochs=1,
        registry=empty_registry(strategies=[scaled]),
    )  # fmt: skip

    applied = [0, 1, 1, 2, 2, 3, 4]
    assert [rates[step][0][0] for step in range(7)] == pytest.approx(
        [0.1 * 0.9**n for n in applied]
    )


def test_the_scale_of_fp16_resumes(tmp_path: Path) -> None:
    scalers: list[Any] = []

    class Growing(SingleStrategy):
        def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
            scaler = cpu_scaler()  # twice as large after every step
            scalers.append(scaler)
            step = OptimizerStep(model, request, scaler=scaler)
            return replace(
                super().setup(model, request),
                optimizer=step.optimizer, step=step.bind(), loss_scaler=scaler,
                backward=lambda loss: scaler.scale(loss).backward(),
            )  # fmt: skip

    scaled = Component("scaled", "a test", Growing, claims=Claims(provides="params.writable"))
    run = partial(
        train, schedule=None, strategy="scaled", registry=empty_registry(strategies=[scaled])
    )
    run(tmp_path / "whole")
    middle = next(p for p in saved(tmp_path / "whole") if p.name == f"step-{MIDDLE}")
    run(tmp_path / "resumed", ckpt_path=middle)

    assert [scaler.get_scale() for scaler in scalers] == [4.0 * 2**TOTAL] * 2

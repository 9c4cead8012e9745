"""What a step costs beside the training itself: counted, never timed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from torchweld import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProfilerWindow,
    Trainer,
)
from torchweld.loop.run import TrainingRun

STEPS = 100
ALLOWED = {"fit": 4.0, "own_loop": 5.0, "two_models": 9.0}
"""Python calls a step above the same loop by hand, borders (every 50 steps) included.

Between two borders it is two for ``fit`` (the loss, the step) and three for an own loop (backward,
step, and the strategy's step); the rest is the border's share.
"""


class Counter:
    """Counts calls of Python functions (and resumed generators) in this thread."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        self.calls += event == "call"


@contextmanager
def counting() -> Iterator[Counter]:
    """Count, with no garbage collected meanwhile.

    It would run the ``__del__``, weak references and ``gc.callbacks`` of whatever ran before in
    this process, at moments that depend on it.
    """
    counter = Counter()
    gc.collect()
    gc.disable()
    sys.setprofile(counter)
    try:
        yield counter
    finally:
        sys.setprofile(None)
        gc.enable()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def make_loader(steps: int, accumulate: int = 1) -> DataLoader[Any]:
    count = 4 * steps * accumulate
    data = TensorDataset(torch.randn(count, 8), torch.randint(0, 3, (count,)))
    return DataLoader(data, 4)


def calls_by_hand(steps: int, accumulate: int) -> int:
    model, loader = make_model(), make_loader(steps, accumulate)
    optimizer = SGD(model.parameters(), lr=0.1)
    model.train()
    with counting() as counter:
        for place, (inputs, targets) in enumerate(loader, start=1):
            loss = F.cross_entropy(model(inputs), targets)
            (loss / accumulate if accumulate > 1 else loss).backward()
            if place % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return counter.calls


def calls_of(train: Callable[[int, int], None], accumulate: int) -> float:
    """Calls a step above the loop by hand; the set-up cancels out between two lengths.

    Not that of the first runs in a process, which import and fill caches: in the first pair, which
    is not taken, the difference is far off, thousands below zero, by what ran before.
    """
    for _ in range(2):
        counts = []
        for steps in (STEPS, 2 * STEPS):
            with counting() as counter:
                train(steps, accumulate)
            counts.append(counter.calls - calls_by_hand(steps, accumulate))
    return (counts[1] - counts[0]) / STEPS


def arguments() -> dict[str, Any]:
    return {"loss": F.cross_entropy, "optimizer": partial(SGD, lr=0.1)}


def make_trainer(accumulate: int, folder: Path | None, settings: dict[str, Any]) -> Trainer:
    """A run in a new folder: one that holds other runs costs calls to find a free name."""
    if folder is not None:
        settings = {**settings, "default_root_dir": mkdtemp(dir=folder)}
    return Trainer(max_epochs=1, accumulate_grad_batches=accumulate, **settings)


def fit(steps: int, accumulate: int, folder: Path | None = None, **settings: Any) -> None:
    trainer = make_trainer(accumulate, folder, settings)
    trainer.fit(make_model(), make_loader(steps, accumulate), **arguments())


def own_loop(steps: int, accumulate: int, folder: Path | None = None, **settings: Any) -> None:
    trainer = make_trainer(accumulate, folder, settings)
    with trainer.prepare(make_model(), make_loader(steps, accumulate), **arguments()) as run:
        read_batches(run)


def read_batches(run: TrainingRun) -> None:
    for inputs, targets in run.batches():
        run.backward(run.loss(run.model(inputs), targets))
        run.step()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("train", [fit, own_loop])
def test_a_batch_costs_few_calls_with_everything_on(
    train: Callable[..., None], accumulate: int, tmp_path: Path
) -> None:
    extra = calls_of(partial(train, folder=tmp_path), accumulate)

    assert 0 < extra / accumulate <= ALLOWED[train.__name__], extra


def two_by_hand(steps: int) -> int:
    models = make_model(), make_model()
    optimizers = [SGD(model.parameters(), lr=0.1) for model in models]
    loader = make_loader(steps)
    with counting() as counter:
        for inputs, targets in loader:
            for model, optimizer in zip(models, optimizers, strict=True):
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
    return counter.calls


def two_models(steps: int, folder: Path) -> None:
    models, optimizer = {"g": make_model(), "d": make_model()}, partial(SGD, lr=0.1)
    trainer = make_trainer(1, folder, {})
    optimizers = dict.fromkeys(models, optimizer)
    with trainer.prepare(models, make_loader(steps), optimizer=optimizers) as run:
        handles = run.models.values()
        for inputs, targets in run.batches():
            for handle in handles:
                handle.backward(F.cross_entropy(handle(inputs), targets))
                handle.step()


def test_a_step_of_one_of_two_models_costs_few_calls(tmp_path: Path) -> None:
    for _ in range(2):  # not the first, as in calls_of
        counts = []
        for steps in (STEPS, 2 * STEPS):
            with counting() as counter:
                two_models(steps, tmp_path)
            counts.append(counter.calls - two_by_hand(steps))
    extra = (counts[1] - counts[0]) / STEPS

    assert 0 < extra / 2 <= ALLOWED["two_models"], extra


class _Kept:
    """A logger of the user's own."""

    def log_metrics(self, metrics: Any, step: int) -> None:
        """Nothing: what it costs is its own affair."""


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("train", [fit, own_loop])
def test_a_batch_costs_few_calls_with_every_callback_and_logger_on(
    train: Callable[..., None], accumulate: int, tmp_path: Path
) -> None:
    def all_on(steps: int, accumulate: int) -> None:
        callbacks = [
            EarlyStopping("train_loss"), LearningRateMonitor(), ProfilerWindow(900, 901),
            ModelCheckpoint(monitor="train_loss"), ModelCheckpoint(),
        ]  # fmt: skip
        train(
            steps, accumulate, callbacks=callbacks, logger=["tensorboard", "csv", _Kept()],
            folder=tmp_path,
        )  # fmt: skip

    extra = calls_of(all_on, accumulate)

    assert 0 < extra / accumulate <= ALLOWED[train.__name__], extra


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_costs_three_calls_with_everything_off(accumulate: int) -> None:
    extra = calls_of(partial(fit, barebones=True), accumulate)

    assert 0 < extra / accumulate <= 3, extra

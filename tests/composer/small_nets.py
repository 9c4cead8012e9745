"""Small models and data, and two ways to train them: by pieces of Parts, and composer.Trainer."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from torchweld.interfaces import Border, Parts, Progress
from torchweld_composer.adopt import adopted_component
from torchweld_composer.imports import composer_module

CLASSES = 4
make_sgd = partial(SGD, lr=0.05, momentum=0.9)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def small_net(*, batchnorm: bool = True, size: int = 8) -> nn.Sequential:
    """Two convolutions, the second strided, and max pooling: something for every surgery."""
    norm: list[nn.Module] = [nn.BatchNorm2d(16)] if batchnorm else []
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        *norm,
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def images(num_samples: int = 24, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(num_samples, 3, size, size, generator=generator)
    targets = torch.randint(CLASSES, (num_samples,), generator=generator)
    return inputs, targets


def loader(num_samples: int = 24, size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(num_samples, size)), batch_size=8)


def algorithm(name: str, **arguments: Any) -> Any:
    """An Algorithm object of Composer's."""
    return getattr(composer_module("composer.algorithms"), name)(**arguments)


def surgery_of(obj: Any) -> Any:
    """What an adopted object becomes."""
    build: Any = adopted_component(obj).build
    return composer_surgery(build) if isinstance(build, str) else build()


def composer_surgery(build: str) -> Any:
    from torchweld_composer import surgeries

    assert build.endswith(":channels_last")
    return surgeries.channels_last(weights=True)


def operated(algorithms: Sequence[Any], model: nn.Module) -> Parts:
    """The parts after every surgery, in this order."""
    parts = Parts(model, loss=F.cross_entropy)
    for obj in algorithms:
        parts = surgery_of(obj).apply(parts)
    return parts


class HandRun:
    """Just enough of a run for pieces to be bound to."""

    def __init__(self, model: nn.Module, optimizer: Any, *, steps: int, per_epoch: int) -> None:
        self.model = _Handle(model, optimizer)
        self.plan = SimpleNamespace(settings=SimpleNamespace(accumulate_grad_batches=1))
        self.progress = Progress(0, 0, 0, per_epoch, steps)


class _Handle:
    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._model, self.optimizer = model, optimizer

    def __call__(self, *args: Any) -> Any:
        return self._model(*args)


def train_parts(
    algorithms: Sequence[Any],
    model: nn.Module,
    data: DataLoader[Any],
    *,
    epochs: int = 2,
    seed: int = 3,
    clip: float | None = None,
) -> list[Tensor]:
    """Train by hand with the pieces of Parts; returns the losses of every step."""
    seed_all(seed)
    parts = operated(algorithms, model)
    seed_all(seed)
    optimizer: Any = make_sgd(parts.model.parameters())
    for wrap in parts.optimizer_wrappers:
        optimizer = wrap(optimizer)
    run: Any = HandRun(parts.model, optimizer, steps=epochs * len(data), per_epoch=len(data))
    bound = replace(
        parts,
        batch_transforms=tuple(_bound(piece, run) for piece in parts.batch_transforms),
        target_transforms=tuple(_bound(piece, run) for piece in parts.target_transforms),
        after_step=tuple(_bound(piece, run) for piece in parts.after_step),
        callbacks=tuple(_bound(piece, run) for piece in parts.callbacks),
        loss=_bound(parts.loss, run),
    )
    return _train(bound, run, data, epochs, clip)


def _bound(piece: Any, run: Any) -> Any:
    return piece.bind(run) if hasattr(piece, "bind") else piece


def _train(parts: Parts, run: Any, data: Any, epochs: int, clip: float | None) -> list[Tensor]:
    losses: list[Tensor] = []
    step = 0
    border(parts, run, step, "fit_start")
    for _ in range(epochs):
        for given in data:
            batch = tuple(given)
            for transform in parts.batch_transforms:
                batch = transform(batch)
            losses.append(_step(parts, run.model.optimizer, batch, clip))
            step += 1
            for act in parts.after_step:
                act()  # type: ignore[operator]  # bound above
        border(parts, run, step, "epoch_end")
    border(parts, run, step, "fit_end")
    return losses


def border(parts: Parts, run: Any, step: int, *kind: str) -> None:
    epoch = step // run.progress.steps_per_epoch
    here = Border(frozenset(kind), replace(run.progress, step=step, epoch=epoch), {})
    for callback in parts.callbacks:
        callback.at(here, run)


def _step(parts: Parts, optimizer: Any, batch: Any, clip: float | None) -> Tensor:
    first: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs, targets = parts.model(batch[0]), batch[1]
        for transform in parts.target_transforms:
            targets = transform(outputs, targets)
        assert parts.loss is not None
        loss: Tensor = parts.loss(outputs, targets)
        loss.backward()
        for change in parts.grad_transforms:
            change(parts.model.named_parameters())
        if clip is not None:
            nn.utils.clip_grad_norm_(parts.model.parameters(), clip)
        first.append(loss.detach().clone())
        return loss

    if getattr(optimizer, "needs_closure", False):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    return first[0]


def train_composer(
    algorithms: Sequence[Any],
    model: nn.Module,
    data: DataLoader[Any],
    *,
    epochs: int = 2,
    seed: int = 3,
) -> list[Tensor]:
    """Train the same with composer.Trainer itself; its durations count batches."""
    losses: list[Tensor] = []
    wrapped = _composer_model(model, losses)
    trainer = composer_module("composer").Trainer(
        model=wrapped,
        train_dataloader=data,
        max_duration=f"{epochs * len(data)}ba",
        algorithms=list(algorithms),
        optimizers=make_sgd(wrapped.parameters()),
        device="cpu",
        seed=seed,
        progress_bar=False,
        log_to_console=False,
        auto_log_hparams=False,
        callbacks=[_losses_callback(losses)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about micro-batches, of Composer's trainer
        trainer.fit()
    trainer.close()
    return losses


def _composer_model(model: nn.Module, losses: list[Tensor]) -> Any:
    parent: Any = composer_module("composer.models").ComposerModel

    class Wrapped(parent):  # type: ignore[misc]  # a class of an untyped library
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, batch: Any) -> Any:
            return self.net(batch[0])

        def loss(self, outputs: Any, batch: Any, reduction: str = "mean") -> Any:
            return F.cross_entropy(outputs, batch[1], reduction=reduction)

    return Wrapped()


def _losses_callback(losses: list[Tensor]) -> Any:
    parent: Any = composer_module("composer").Callback

    class Losses(parent):  # type: ignore[misc]  # a class of an untyped library
        def after_train_batch(self, state: Any, logger: Any) -> None:
            losses.append(state.loss.detach().clone())

    return Losses()


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models of one structure hold the same bits."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


Build = Callable[[], list[Any]]

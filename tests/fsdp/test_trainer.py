"""Whole runs under ``fsdp``: what a user writes, on two processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from tests.fsdp.gpt import Gpt, text
from torchweld import Trainer, use
from torchweld.errors import TorchweldError
from torchweld.testing import models, run_ranks

BATCH = 2
SAMPLES = 26  # 6 batches of 2 on each of two ranks, and a last one of 1


def no_decay(name: str, module: nn.Module, parameter: nn.Parameter) -> Mapping[str, object]:
    """No weight decay on norms and biases, as every GPT has it."""
    return {"weight_decay": 0.0 if parameter.ndim < 2 else 0.1}


def one_cycle(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.01, total_steps=total_steps)


def make_gpt() -> nn.Module:
    torch.manual_seed(1)
    return Gpt()


def trainer_of(strategy: Any, **settings: Any) -> Trainer:
    defaults = {
        "data": use("torch", batch_size=BATCH),
        "max_epochs": 2,
        "seed": 3,
        "enable_progress_bar": False,
        "logger": False,
        "default_root_dir": "runs",
    }
    return Trainer(strategy=strategy, **{**defaults, **settings})


def fit_gpt(
    strategy: str, options: Mapping[str, Any], own_loop: bool = False, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train, export; the whole weights and the metrics."""
    trainer = trainer_of(use(strategy, **options), **settings)
    arguments: dict[str, Any] = {
        "loss": F.cross_entropy,
        "optimizer": partial(AdamW, lr=1e-3, eps=1e-4),
        "param_groups": no_decay,
        "lr_scheduler": one_cycle,
    }
    data, val = TensorDataset(*text(SAMPLES)), TensorDataset(*text(7, seed=1))
    metrics: dict[str, float] = {}
    if own_loop:
        with trainer.prepare(make_gpt, data, val=val, **arguments) as run:
            for inputs, targets in run.batches():
                run.backward(run.loss(run.model(inputs), targets))
                run.step()
            run.export("weights.safetensors")
    else:
        metrics = dict(trainer.fit(make_gpt, data, val=val, **arguments).metrics)
        trainer.export("weights.safetensors")
    return load_file("weights.safetensors"), metrics


@pytest.fixture(scope="module")
def by_ddp() -> tuple[dict[str, Tensor], dict[str, float]]:
    weights_and_metrics, _ = run_ranks(fit_gpt, 2, "ddp", {}, timeout_seconds=180)
    return weights_and_metrics  # type: ignore[no-any-return]  # what a rank returns has no type


@pytest.mark.parametrize(
    "options",
    [{}, {"reshard_after_forward": False}, {"deferred_init": False}, {"wrap": ["Linear"]}],
    ids=str,
)
def test_fit_equals_ddp_bitwise(by_ddp: Any, options: dict[str, Any]) -> None:
    expected, metrics = by_ddp

    (weights, found), _ = run_ranks(fit_gpt, 2, "fsdp", options, timeout_seconds=180)

    assert [name for name in expected if not weights[name].equal(expected[name])] == []
    assert found["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)


def test_an_own_loop_equals_fit_bitwise(by_ddp: Any) -> None:
    expected, _ = by_ddp

    (weights, _), _ = run_ranks(fit_gpt, 2, "fsdp", {}, True, timeout_seconds=180)

    assert [name for name in expected if not weights[name].equal(expected[name])] == []


def fit_by_predicate() -> float:
    data = TensorDataset(*models.features(8))
    trainer = trainer_of(use("fsdp", wrap=lambda name, module: name == "0"), barebones=True)
    result = trainer.fit(models.mlp, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    return float(result.metrics["train_loss"])


def test_units_may_be_chosen_by_a_lambda() -> None:
    first, second = run_ranks(fit_by_predicate, 2, timeout_seconds=180)

    assert first == second


# ---- parameters and methods of the user's choice -------------------------------------------------


class Encoder(nn.Module):
    """A model whose training calls another method than ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(33, 17), nn.Linear(17, 7)
        self.temperature = nn.Parameter(torch.ones(()))

    def encode(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.body(inputs))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encode(inputs)) * self.temperature
        return logits


def make_encoder() -> nn.Module:
    torch.manual_seed(1)
    return Encoder()


def train_encoder(
    strategy: str, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    trainer = trainer_of(use(strategy, **options), **settings)
    data = TensorDataset(*models.features(24))
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    trainer.fit(make_encoder(), data, loss=F.cross_entropy, optimizer=optimizer)
    trainer.export("weights.safetensors")
    return load_file("weights.safetensors")


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_ignored_parameters_are_trained_alike_on_every_rank(settings: dict[str, Any]) -> None:
    options = {"ignored": ("temperature",)}
    (expected, _) = run_ranks(train_encoder, 2, "ddp", {}, settings, timeout_seconds=180)

    found = run_ranks(train_encoder, 2, "fsdp", options, settings, timeout_seconds=180)

    for name, tensor in expected.items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=1e-7)


def encode_with(methods: tuple[str, ...]) -> str:
    trainer = trainer_of(use("fsdp", forward_methods=methods, ignored=("temperature",)))
    data = TensorDataset(*models.features(8))
    with trainer.prepare(
        make_encoder(), data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1)
    ) as run:
        module: Any = run.wiring.model
        try:
            return str(tuple(module.encode(torch.randn(2, 33)).shape))
        except RuntimeError as error:
            return str(error)


def test_methods_that_are_named_may_be_called_like_forward() -> None:
    assert "DTensor" in run_ranks(encode_with, 2, (), timeout_seconds=180)[0]

    assert run_ranks(encode_with, 2, ("encode",), timeout_seconds=180)[0] == "(2, 17)"


# ---- ranks that differ ---------------------------------------------------------------------------


def built_differently(layers: Mapping[str, tuple[int, int]]) -> str:
    """Train a model that has other layers on rank 1; FSDP2 alone would abort, or say nothing."""
    mine = layers if os.environ["RANK"] == "1" else {"first": (33, 6), "second": (6, 33)}
    model = nn.Sequential()
    for name, (inputs, outputs) in mine.items():
        model.add_module(name, nn.Linear(inputs, outputs))
    data = TensorDataset(*models.features(8))
    with pytest.raises(TorchweldError) as caught:
        trainer_of("fsdp", barebones=True).fit(
            model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1)
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"first": (33, 7), "second": (7, 33)}, "first.weight"),
        ({"first": (33, 6), "second": (6, 33), "third": (33, 33)}, "third.weight"),
        ({"first": (6, 33), "second": (33, 6)}, "first.weight"),
        ({"second": (33, 6), "first": (6, 33)}, "second.weight"),
    ],
    ids=["another size", "a layer more", "as many elements", "another order"],
)
def test_ranks_with_different_models_are_told_the_first_name_that_differs(
    layers: Mapping[str, tuple[int, int]], named: str
) -> None:
    for message in run_ranks(built_differently, 2, layers, timeout_seconds=180):
        assert "TW504" in message
        assert named in message


class Lopsided(DataLoader[Any]):
    """What a script that shares out its data itself may make: another length on each rank."""

    def __init__(self, extra: int) -> None:
        inputs, targets = models.features(12)
        start = 4 if os.environ["RANK"] == "0" else 0
        here = slice(start, start + 4 + extra * (os.environ["RANK"] == "0"))
        super().__init__(TensorDataset(inputs[here], targets[here]), batch_size=2)


def lopsided(train_extra: int, val_extra: int) -> tuple[int, float]:
    torch.manual_seed(1)
    trainer = trainer_of("fsdp", data=use("torch", sharded=True), max_epochs=1, barebones=True)
    result = trainer.fit(
        models.mlp(),
        Lopsided(train_extra),
        val=Lopsided(val_extra),
        loss=F.cross_entropy,
        optimizer=partial(SGD, lr=0.0),
    )
    return result.progress.step, result.metrics["val_loss"]


def test_ranks_with_unequal_loaders_stop_together_and_count_every_sample() -> None:
    torch.manual_seed(1)
    inputs, targets = models.features(12)
    used = torch.cat([inputs[4:12], inputs[0:4]]), torch.cat([targets[4:12], targets[0:4]])
    expected = F.cross_entropy(models.mlp().eval()(used[0]), used[1]).item()

    for steps, loss in run_ranks(lopsided, 2, 2, 4, timeout_seconds=180):
        assert steps == 2
        assert loss == pytest.approx(expected, abs=1e-6)


# ---- resuming ------------------------------------------------------------------------------------


def fit_mlp(strategy: str, epochs: int, root: str, resume: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    trainer = trainer_of(strategy, max_epochs=epochs, default_root_dir=root)
    data = TensorDataset(*models.features(24))
    trainer.fit(
        models.mlp(),
        data,
        loss=F.cross_entropy,
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        ckpt_path="last" if resume else None,
    )
    trainer.export(Path(root) / "weights.safetensors")
    return load_file(Path(root) / "weights.safetensors")


def test_a_run_moves_from_fsdp_to_ddp_and_back(tmp_path: Path) -> None:
    straight, _ = run_ranks(fit_mlp, 2, "fsdp", 3, str(tmp_path / "a"), False, timeout_seconds=180)

    root = str(tmp_path / "b")
    for epochs, strategy in enumerate(["fsdp", "ddp", "fsdp"], start=1):
        arguments = strategy, epochs, root, epochs > 1
        moved, _ = run_ranks(fit_mlp, 2, *arguments, timeout_seconds=180)

    assert [name for name in straight if not moved[name].equal(straight[name])] == []

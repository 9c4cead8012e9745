"""What needs a CUDA device: ``python3 noxfile.py -s gpu`` on a machine that has one."""

from __future__ import annotations

from collections import UserDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from torchweld import Trainer
from torchweld.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))


def make_loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 8)


def fit(trainer: Trainer, model: nn.Module, **more: Any) -> dict[str, float]:
    arguments = {"loss": F.cross_entropy, "optimizer": partial(SGD, lr=0.1), **more}
    return dict(trainer.fit(model, make_loader(), **arguments).metrics)


def test_single_on_a_gpu_equals_a_loop_by_hand_bitwise() -> None:
    expected, result = make_model().cuda(), make_model()
    optimizer = SGD(expected.parameters(), lr=0.1)
    torch.manual_seed(3)
    for inputs, targets in make_loader():
        F.cross_entropy(expected(inputs.cuda()), targets.cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(3)
    fit(Trainer(barebones=True), result)

    assert all(map(torch.equal, result.parameters(), expected.parameters()))


@pytest.mark.parametrize("precision", ["16", "bf16", "bf16-true"])
def test_reduced_precision_learns_on_a_gpu(precision: str) -> None:
    metrics = fit(Trainer(precision=precision, max_epochs=20, barebones=True), make_model())

    assert metrics["train_loss"] < 0.8


def test_a_skipped_fp16_step_does_not_move_the_schedule() -> None:
    seen: list[int] = []

    class Scheduler:
        def step(self) -> None:
            seen.append(1)

        def state_dict(self) -> dict[str, Any]:
            return {}

    def overflow(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets) * 1e30

    trainer = Trainer(precision="16", max_steps=3, barebones=True)
    fit(trainer, make_model(), loss=overflow, lr_scheduler=lambda optimizer, steps: Scheduler())

    assert seen == []


def test_mappings_of_any_kind_are_moved_to_the_gpu() -> None:
    def collate(samples: list[Any]) -> UserDict[str, torch.Tensor]:
        inputs, targets = zip(*samples, strict=True)
        return UserDict(x=torch.stack(inputs), y=torch.stack(targets))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_model()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": F.cross_entropy(self.body(x), y)}

    loader: DataLoader[Any] = DataLoader(make_loader().dataset, 8, collate_fn=collate)
    Trainer(barebones=True).fit(Model(), loader, optimizer=partial(SGD, lr=0.1))


def test_resume_on_a_gpu_is_bitwise(tmp_path: Path) -> None:
    whole, half, resumed = make_model(), make_model(), make_model()
    settings: dict[str, Any] = {"max_epochs": 2, "seed": 5, "logger": False}
    fit(Trainer(**settings, default_root_dir=tmp_path / "whole"), whole)

    fit(Trainer(**{**settings, "max_epochs": 1}, default_root_dir=tmp_path / "half"), half)
    fit(Trainer(**settings, default_root_dir=tmp_path / "half"), resumed, ckpt_path="last")

    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


def _ddp_over_nccl() -> float:
    return fit(Trainer(strategy="ddp", max_epochs=20, barebones=True), make_model())["train_loss"]


def test_ddp_trains_over_nccl() -> None:
    losses = run_ranks(_ddp_over_nccl, min(torch.cuda.device_count(), 2))

    assert max(losses) < 0.8

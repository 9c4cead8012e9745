"""A student of a frozen teacher on two processes, against plain PyTorch in one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from torchweld import Trainer, use
from torchweld.testing import run_ranks

STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "zero2": use("deepspeed", stage=2),
    "zero3": use("deepspeed", stage=3, persistence_threshold=10),
}
RATE, MOMENTUM, BATCH = 0.1, 0.9, 8


def make_models() -> dict[str, nn.Module]:
    """A teacher with what behaves otherwise while training, and a smaller student."""
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17), nn.Dropout(0.5), nn.Linear(17, 5))
    return {
        "student": nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)),
        "teacher": teacher,
    }


def make_data() -> TensorDataset:
    random = torch.Generator().manual_seed(0)
    return TensorDataset(*(torch.randn(40, size, generator=random) for size in (6, 5)))


def loss_of(student: Any, teacher: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Near the targets, and near what the teacher says."""
    outputs = student(inputs)
    return F.mse_loss(outputs, targets) + F.mse_loss(outputs, teacher(inputs))


def by_hand() -> dict[str, nn.Module]:
    """One process with the batches of both."""
    models = make_models()
    student, teacher = models["student"], models["teacher"].eval().requires_grad_(False)
    optimizer = SGD(student.parameters(), lr=RATE, momentum=MOMENTUM)
    inputs, targets = make_data().tensors
    for start in range(0, 2 * len(inputs), BATCH):
        part = slice(start % len(inputs), start % len(inputs) + BATCH)
        loss_of(student, teacher, inputs[part], targets[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return models


def _distil(run: Any, batch: Any) -> Tensor:
    return loss_of(run.models["student"], run.models["teacher"], *batch)


def _train(name: str, folder: Path) -> bool:
    data = use("torch", batch_size=BATCH // 2, shuffle=False)
    trainer = Trainer(strategy=STRATEGIES[name], data=data, max_epochs=2, barebones=True)
    student = partial(SGD, lr=RATE, momentum=MOMENTUM)
    trainer.fit(
        make_models(), make_data(), step=_distil, optimizer={"student": student, "teacher": None}
    )
    trainer.export(folder)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_student_learns_of_a_teacher_that_stays_as_it_is(name: str, tmp_path: Path) -> None:
    expected = by_hand()

    run_ranks(_train, 2, name, tmp_path, timeout_seconds=300)

    student, teacher = (load_file(tmp_path / f"{n}.safetensors") for n in ("student", "teacher"))
    for key, tensor in expected["student"].state_dict().items():
        torch.testing.assert_close(student[key], tensor, rtol=1e-5, atol=1e-7)
    kept = expected["teacher"].state_dict()
    assert all(torch.equal(teacher[key], tensor) for key, tensor in kept.items())
    before = make_models()["student"].state_dict()["0.weight"]
    assert float((student["0.weight"] - before).abs().max()) > 0.01  # it has learned

"""Recognise handwritten digits: what a recipe cannot say, and the recipe's run as a script."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import Subset, TensorDataset, random_split

from torchweld import Trainer, use

Images = Subset[tuple[Tensor, ...]]


def load_data() -> tuple[Images, Images]:
    """1 797 images of 1 x 8 x 8, split into training and validation, alike on every process."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, val = random_split(data, [1437, 360], generator=torch.Generator().manual_seed(0))
    return train, val


def make_model(width: int = 16) -> nn.Module:
    """Three convolutions of ``width`` to ``4 * width`` channels; blurpool acts on the strided."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.BatchNorm2d(4 * width),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def accuracy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Right answers, and how many there could have been."""
    return (outputs.argmax(dim=1) == targets).sum(), len(targets)


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The learning rate rises and falls once over the run."""
    return OneCycleLR(optimizer, max_lr=0.4, total_steps=total_steps)


def main(epochs: int = 8) -> None:
    """What the recipe says."""
    train, val = load_data()
    trainer = Trainer(
        data=use("torch", batch_size=32),
        surgery=["label_smoothing", "channels_last", use("cutmix", alpha=0.5), "blurpool"],
        max_epochs=epochs,
        log_every_n_steps=10,
        seed=1,
    )
    trainer.fit(
        partial(make_model, width=16),
        train,
        val,
        loss=F.cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=one_cycle,
    )
    trainer.export("digits.safetensors")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Recognise handwritten digits with a small convolutional net and the usual ingredients.

Mixup, label smoothing, a learning rate that falls at certain epochs, averaged weights.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Beta
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from torchweld import Claims, Component, LRSchedule, Parts, Trainer


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """1 437 images of 1 x 8 x 8 and their digits, and 360 for validation."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(digits.target)
    return TensorDataset(images[:1437], targets[:1437]), TensorDataset(
        images[1437:], targets[1437:]
    )


def make_model() -> nn.Module:
    """Three convolutions with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def mixup(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Blend every image and its target with those of another (Zhang et al. 2018)."""
    images, targets = batch[0], F.one_hot(batch[1], 10).float()
    share = Beta(0.2, 0.2).sample()
    others = torch.randperm(len(images))
    return images.lerp(images[others], share), targets.lerp(targets[others], share)


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a tenth of each target spread over all digits."""
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


def average_of(model: nn.Module) -> AveragedModel:
    """The exponential average of a model's weights and buffers."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)


class Averaging:
    """Updates the average after every step; it is part of the checkpoints."""

    def __init__(self, average: AveragedModel) -> None:
        self.average = average
        self.state_dict, self.load_state_dict = average.state_dict, average.load_state_dict

    def apply(self, parts: Parts) -> Parts:
        """Core calls it once, before the model is wrapped."""
        update = partial(self.average.update_parameters, parts.model)
        return replace(parts, after_step=(*parts.after_step, update))


def add_mixup(parts: Parts) -> Parts:
    """Mixup for the batches of training."""
    return replace(parts, batch_transforms=(*parts.batch_transforms, mixup))


def accuracy(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Right answers, and how many there could have been."""
    return (logits.argmax(1) == targets).sum(), len(targets)


def main() -> None:
    """Train, evaluate the weights and their average, save the average."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--strategy", default="auto")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, val = load_data()
    model = make_model()
    average = average_of(model)
    train_loader = DataLoader(train, 32, shuffle=True)
    val_loader = DataLoader(val, 120)
    milestones = [options.epochs * 6 // 10, options.epochs * 9 // 10]

    mixing = Component(
        "mixup",
        "blend every image with another",
        build=lambda: add_mixup,
        claims=Claims(edits=["batch.inputs", "batch.targets"]),
    )
    averaging = Component(
        "averaging",
        "an exponential average of the weights",
        build=lambda: Averaging(average),
        claims=Claims(owns="weights.average", edits=(), requires="params.local"),
    )
    trainer = Trainer(
        strategy=options.strategy, surgery=[mixing, averaging], max_epochs=options.epochs
    )
    result = trainer.fit(
        model,
        train_loader,
        val_loader,
        loss=smoothed,
        metrics={"accuracy": accuracy},
        optimizer=partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=LRSchedule(lambda o, _: MultiStepLR(o, milestones), interval="epoch"),
    )
    print(f"accuracy: {result.metrics['val_accuracy']:.4f}")
    averaged = trainer.evaluate(average.module, val_loader, metrics={"accuracy": accuracy})
    print(f"accuracy of the average: {averaged['accuracy']:.4f}")
    trainer.export("image_classifier.safetensors")
    if os.environ.get("RANK", "0") == "0":
        save_file(average.module.state_dict(), "average.safetensors")


if __name__ == "__main__":
    main()

"""Recognise handwritten digits with a small convolutional net and the usual ingredients.

Mixup, label smoothing, a learning rate that falls at certain epochs, averaged weights.
"""

from __future__ import annotations

import argparse

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


def main() -> None:
    """Train, evaluate the weights and their average, save the average."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    train, val = load_data()
    model = make_model()
    average = average_of(model)
    train_loader = DataLoader(train, 32, shuffle=True)
    val_loader = DataLoader(val, 120)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    milestones = [options.epochs * 6 // 10, options.epochs * 9 // 10]
    scheduler = MultiStepLR(optimizer, milestones)

    for _ in range(options.epochs):
        model.train()
        for batch in train_loader:
            images, targets = mixup(batch)
            loss = smoothed(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        scheduler.step()

    for name, trained in {"accuracy": model, "accuracy of the average": average.module}.items():
        trained.eval()
        right = 0
        with torch.no_grad():
            for images, targets in val_loader:
                right += (trained(images).argmax(1) == targets).sum().item()
        print(f"{name}: {right / len(val):.4f}")
    save_file(model.state_dict(), "image_classifier.safetensors")
    save_file(average.module.state_dict(), "average.safetensors")


if __name__ == "__main__":
    main()

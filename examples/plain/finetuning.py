"""Fine-tune a pretrained network: its new head first, all of it later.

The network has learnt the digits 0 to 4; what it is to tell apart are 5 to 9.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A convolutional backbone, and a head for five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(batch, 1, 8, 8)`` to logits ``(batch, 5)``."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def digits_from(first: int) -> tuple[Tensor, Tensor]:
    """The images of five digits from ``first`` on, and their classes 0 to 4."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    classes = torch.tensor(digits.target) - first
    ours = (classes >= 0) & (classes < 5)
    return images[ours], classes[ours]


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """The digits 5 to 9, and 200 of them for validation."""
    images, classes = digits_from(5)
    return TensorDataset(images[:-200], classes[:-200]), TensorDataset(
        images[-200:], classes[-200:]
    )


def pretrain() -> Net:
    """What would be downloaded elsewhere."""
    model, data = Net(), TensorDataset(*digits_from(0))
    optimizer = AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for images, targets in DataLoader(data, 32, shuffle=True):
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def make_model() -> Net:
    """The pretrained network with a new head; the rest is frozen."""
    model = pretrain()
    model.head = nn.Linear(64, 5)
    model.backbone.requires_grad_(requires_grad=False)
    return model


def main() -> None:
    """Pretrain, exchange the head, train it, then everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--unfreeze", type=int, default=3, help="the epoch that trains everything")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, val = load_data()
    model = make_model()
    train_loader = DataLoader(train, 32, shuffle=True)
    val_loader = DataLoader(val, 100)
    groups: list[dict[str, Any]] = [
        {"params": list(model.backbone.parameters()), "lr": 1e-3},
        {"params": list(model.head.parameters())},
    ]
    optimizer = AdamW(groups, lr=1e-2)

    for epoch in range(options.epochs):
        if epoch == options.unfreeze:
            model.backbone.requires_grad_(requires_grad=True)
        for images, targets in train_loader:
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    right = 0
    with torch.no_grad():
        for images, targets in val_loader:
            right += (model(images).argmax(1) == targets).sum().item()
    print(f"accuracy: {right / len(val):.4f}")
    save_file(model.state_dict(), "finetuning.safetensors")


if __name__ == "__main__":
    main()

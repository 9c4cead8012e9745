"""Draw handwritten digits: a generative adversarial network (Goodfellow et al. 2014).

Two networks with an optimizer each: one draws, the other tells drawings from digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

LATENT = 16  # random numbers of which a drawing is made


def make_generator() -> nn.Module:
    """Numbers ``(batch, 16)`` to images ``(batch, 64)`` in [0, 1]."""
    return nn.Sequential(
        nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64),
        nn.Sigmoid(),
    )  # fmt: skip


def make_discriminator() -> nn.Module:
    """Images ``(batch, 64)`` to the logit of being a digit ``(batch,)``."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2),
        nn.Linear(64, 1), nn.Flatten(0),
    )  # fmt: skip


def verdict_loss(logits: Tensor, wanted: float) -> Tensor:
    """How far verdicts are from what is wanted: 1 for a digit, 0 for a drawing."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, wanted))


def main() -> None:
    """Train both, compare the mean drawing with the mean digit, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    loader = DataLoader(TensorDataset(images), 32, shuffle=True)
    generator, discriminator = make_generator(), make_discriminator()
    optimizer_g = Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    optimizer_d = Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))

    for epoch in range(options.epochs):
        for [digits] in loader:
            drawn = generator(torch.randn(len(digits), LATENT))

            real, fake = discriminator(torch.cat([digits, drawn.detach()])).chunk(2)
            loss_d = (verdict_loss(real, 1.0) + verdict_loss(fake, 0.0)) / 2
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()

            loss_g = verdict_loss(discriminator(drawn), 1.0)
            optimizer_g.zero_grad()
            loss_g.backward()
            optimizer_g.step()
        print(f"epoch {epoch + 1}: loss_d {loss_d.item():.3f}, loss_g {loss_g.item():.3f}")

    with torch.no_grad():
        drawn = generator(torch.randn(1000, LATENT))
    error = (drawn.mean(0) - images.mean(0)).abs().mean()
    print(f"error of the mean drawing: {error:.4f}")
    Path("gan").mkdir(exist_ok=True)
    save_file(generator.state_dict(), "gan/g.safetensors")
    save_file(discriminator.state_dict(), "gan/d.safetensors")


if __name__ == "__main__":
    main()

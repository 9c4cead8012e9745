"""Learn to draw handwritten digits: a variational autoencoder (Kingma & Welling 2014).

Its loss has two parts, both of which one wants to see.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """1 437 images of 1 x 8 x 8 without their digits, and 360 for validation."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images[:1437]), TensorDataset(images[1437:])


class VAE(nn.Module):
    """Images to a normal distribution over 8 numbers, and a draw of it back to an image."""

    def __init__(self, width: int = 128, latent: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64), nn.Unflatten(1, (1, 8, 8))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the pixels ``(batch, 1, 8, 8)``; mean and log-variance ``(batch, 8)``."""
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        drawn = mean + (logvar / 2).exp() * torch.randn_like(mean) if self.training else mean
        return self.decoder(drawn), mean, logvar


def losses(images: Tensor, logits: Tensor, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """The negative evidence lower bound in nats an image, and its two parts."""
    pixels = F.binary_cross_entropy_with_logits(logits, images, reduction="none")
    reconstruction = pixels.sum((1, 2, 3)).mean()
    divergence = (mean**2 + logvar.exp() - 1 - logvar).sum(1).mean() / 2
    return {
        "loss": reconstruction + divergence,
        "reconstruction": reconstruction,
        "divergence": divergence,
    }


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()

    torch.manual_seed(0)
    train, val = load_data()
    model = VAE()
    loader = DataLoader(train, 32, shuffle=True)
    optimizer = Adam(model.parameters(), lr=2e-3)

    for epoch in range(options.epochs):
        seen: dict[str, list[Tensor]] = {"reconstruction": [], "divergence": []}
        for [batch] in loader:
            parts = losses(batch, *model(batch))
            parts["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, values in seen.items():
                values.append(parts[name].detach())
        means = {name: torch.stack(values).mean().item() for name, values in seen.items()}
        print(epoch + 1, *(f"{name} {mean:.2f}" for name, mean in means.items()))

    model.eval()
    with torch.no_grad():
        images = val.tensors[0]
        error = (model(images)[0].sigmoid() - images).abs().mean()
    print(f"error of a pixel: {error:.4f}")
    save_file(model.state_dict(), "vae.safetensors")


if __name__ == "__main__":
    main()

"""Draw handwritten digits: a generative adversarial network (Goodfellow et al. 2014).

Two networks with an optimizer each: one draws, the other tells drawings from digits.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from torchweld import Trainer

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
    parser.add_argument("--strategy", default="auto")
    options = parser.parse_args()

    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    loader = DataLoader(TensorDataset(images), 32, shuffle=True)
    generator, discriminator = make_generator(), make_discriminator()
    adam = partial(Adam, lr=1e-3, betas=(0.5, 0.999))

    trainer = Trainer(strategy=options.strategy, max_epochs=options.epochs)
    with trainer.prepare(
        {"g": generator, "d": discriminator}, loader, optimizer={"g": adam, "d": adam}
    ) as run:
        g, d = run.models["g"], run.models["d"]
        for [digits] in run.batches():
            drawn = g(torch.randn(len(digits), LATENT))

            real, fake = d(torch.cat([digits, drawn.detach()])).chunk(2)
            d.backward((verdict_loss(real, 1.0) + verdict_loss(fake, 0.0)) / 2)
            d.step()

            with g.alone():
                g.backward(verdict_loss(d(drawn), 1.0))
            g.step()

        with torch.no_grad():
            drawn = g(torch.randn(1000, LATENT))
    error = (drawn.mean(0) - images.mean(0)).abs().mean()
    print(f"error of the mean drawing: {error:.4f}")
    trainer.export("gan")


if __name__ == "__main__":
    main()

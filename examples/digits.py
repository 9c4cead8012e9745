"""Train a small convolutional net on scikit-learn's digits, with four of Composer's speed-ups.

Start it with two processes, on a laptop or on GPUs::

    torchrun --nproc-per-node 2 examples/digits.py

It prints the plan, trains, stops half-way and resumes from the checkpoint, exports the weights,
and loads them into a model of its own again. TensorBoard logs and checkpoints are under ``runs/``:
``tensorboard --logdir runs``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import Subset, TensorDataset, random_split

from torchweld import Trainer, apply_surgery, use
from torchweld.interfaces import Border, Result, Run

Images = Subset[tuple[Tensor, ...]]

# The order does not matter: the plan finds the right one, and says why.
SURGERY = ["label_smoothing", "channels_last", use("cutmix", alpha=0.5), "blurpool"]


def load_data() -> tuple[Images, Images]:
    """1 797 images of 1 x 8 x 8, split into training and validation, alike on every process."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, val = random_split(data, [1437, 360], generator=torch.Generator().manual_seed(0))
    return train, val


def make_model() -> nn.Module:
    """Three convolutions; the strided ones are what blurpool replaces."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def accuracy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Right answers, and how many there could have been."""
    return (outputs.argmax(dim=1) == targets).sum(), len(targets)


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The learning rate rises and falls once over the run."""
    return OneCycleLR(optimizer, max_lr=0.4, total_steps=total_steps)


class Interruption:
    """Stops a run after some epochs, as a time limit on a cluster would."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def at(self, border: Border, run: Run) -> None:
        """Callbacks act at borders between steps, never in every step."""
        if border.progress.epoch >= self.epochs:
            run.stop()


def make_trainer(epochs: int, root: Path, callbacks: Sequence[Interruption] = ()) -> Trainer:
    """The same run, whole or with an interruption."""
    return Trainer(
        data=use("torch", batch_size=32),
        surgery=SURGERY,
        max_epochs=epochs,
        default_root_dir=root,
        log_every_n_steps=10,
        callbacks=callbacks,
        seed=1,
    )


def fit(trainer: Trainer, train: Images, val: Images, ckpt_path: str | None = None) -> Result:
    """Train, from the start or from a checkpoint."""
    return trainer.fit(
        make_model,  # a function is called after seeding, so every run starts alike
        train,
        val,
        loss=F.cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=one_cycle,
        ckpt_path=ckpt_path,
    )


def main() -> None:
    """Plan, train half, resume, export, load the export again."""
    parser = argparse.ArgumentParser(description="digits with torchweld")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    epochs, root = arguments.epochs, arguments.root
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_: None
    train, val = load_data()

    trainer = make_trainer(epochs, root)
    say(trainer.plan.explain())
    fit(make_trainer(epochs, root, [Interruption(epochs // 2)]), train, val)
    result = fit(trainer, train, val, ckpt_path="last")

    weights = trainer.export(root / "digits.safetensors")
    model = apply_surgery(make_model(), SURGERY)
    model.load_state_dict(load_file(weights))
    images, targets = zip(*(val[i] for i in range(len(val))), strict=True)
    right, _ = accuracy(model.eval()(torch.stack(images)), torch.stack(targets))
    say(f"validation accuracy {result.metrics['val_accuracy']:.3f}")
    say(f"of the exported weights in a new model {right / len(val):.3f}")
    say(f"weights: {weights}   logs: tensorboard --logdir {root}")


if __name__ == "__main__":
    main()

"""The same small training twice: by hand in plain PyTorch, and through torchweld."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torchweld import Trainer, use
from torchweld.loop.run import TrainingRun

EPOCHS = 2
BATCH = 4
SEED = 7
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.01),
}


def make_data(num_samples: int = 44) -> TensorDataset:
    """Small images in three classes; 11 batches of 4, so that windows of 4 end in one of 3."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_samples, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(0, 3, (num_samples,), generator=generator))


def make_model() -> nn.Module:
    """Convolutions, BatchNorm and dropout: everything that has a state of its own."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


def decay(optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """A schedule that changes the learning rate in every step."""
    return LambdaLR(optimizer, lambda step: 1 - step / (2 * total_steps))


def windows(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` batches, the last one short."""
    window: list[Any] = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def by_hand(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    optimizer: str = "sgd",
    accumulate: int = 1,
    clip: float | None = None,
    epochs: int = EPOCHS,
) -> None:
    """Train as one would write it; works for a module and for its DDP wrapper."""
    made = OPTIMIZERS[optimizer](model.parameters())
    steps = -(-len(loader) // accumulate) * epochs
    scheduler = decay(made, steps)
    model.train()
    for epoch in range(epochs):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for window in windows(iter(loader), accumulate):
            for place, (inputs, targets) in enumerate(window):
                if isinstance(model, DistributedDataParallel):
                    model.require_backward_grad_sync = place == len(window) - 1
                loss = F.cross_entropy(model(inputs), targets)
                (loss / len(window) if accumulate > 1 else loss).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            made.step()
            made.zero_grad()
            scheduler.step()


def make_trainer(
    *, accumulate: int = 1, clip: float | None = None, extras: bool = False, **more: Any
) -> Trainer:
    """A Trainer for the same training; ``extras`` writes logs and checkpoints."""
    return Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        log_every_n_steps=3,
        barebones=not extras,
        **more,
    )


def arguments(optimizer: str = "sgd") -> dict[str, Any]:
    """What ``fit`` and ``prepare`` are given."""
    return {
        "loss": F.cross_entropy,
        "optimizer": OPTIMIZERS[optimizer],
        "lr_scheduler": decay,
    }


def own_loop(run: TrainingRun) -> None:
    """The loop as a user writes it."""
    for inputs, targets in run.batches():
        loss = run.loss(run.model(inputs), targets)
        run.backward(loss)
        run.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise equal."""
    return [name for name in left if not torch.equal(left[name], right[name])]


def core_order() -> Any:
    """The data source for a Dataset; its order is DistributedSampler's."""
    return use("torch", batch_size=BATCH)

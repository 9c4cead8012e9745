"""A training of a second or less, in the forms that resuming has to survive."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from torchweld import Trainer, use
from torchweld.callbacks import ModelCheckpoint
from torchweld.interfaces import Border, Result, Run

BATCH = 4
SEED = 7
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9),
    "adamw": partial(AdamW, lr=0.01),
    "lbfgs": partial(LBFGS, lr=0.1, max_iter=3, history_size=4),
}


def make_data(num_samples: int = 22) -> TensorDataset:
    """Vectors in three classes; 22 samples are 5 batches of 4 and one of 2."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


def make_images(num_samples: int = 22) -> TensorDataset:
    """The same as small images, for cutmix."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 3, 8, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


def make_model() -> nn.Module:
    """BatchNorm and dropout: state of its own, and random numbers in every step."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )


def make_net() -> nn.Module:
    """A convolution for images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


class Stream(IterableDataset[Any]):
    """The data without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(make_data())


class Augmented(TensorDataset):
    """Adds noise of torch's, numpy's and python's random state to every sample."""

    def __getitem__(self, index: Any) -> Any:
        inputs, target = super().__getitem__(index)  # type: ignore[no-untyped-call]  # torch's
        noise = 0.1 * torch.randn(6) + 0.1 * np.random.rand() + 0.1 * random.random()
        return inputs + noise.float(), target


class PythonShuffled:
    """A user's sampler that draws from python's random state at the beginning of an epoch."""

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        indices = list(range(22))
        random.shuffle(indices)
        return iter(indices)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _without_batching() -> DataLoader[Any]:
    """``batch_size=None``: the sampler gives whole batches."""
    data = make_data(24)
    batches = BatchSampler(RandomSampler(data, generator=_generator()), BATCH, drop_last=False)
    return DataLoader(data, batch_size=None, sampler=batches)


DATA: dict[str, Callable[[], Any]] = {
    "dataset": make_data,
    "augmented dataset": lambda: Augmented(*make_data().tensors),
    "shuffling loader": lambda: DataLoader(make_data(), BATCH, shuffle=True),
    "even shuffling loader": lambda: DataLoader(make_data(24), BATCH, shuffle=True),
    "own generator": lambda: DataLoader(make_data(), BATCH, shuffle=True, generator=_generator()),
    "even own generator": lambda: DataLoader(
        make_data(24), BATCH, shuffle=True, generator=_generator()
    ),
    "sampler with own generator": lambda: DataLoader(
        make_data(24), BATCH, sampler=RandomSampler(make_data(24), generator=_generator())
    ),
    "replacement": lambda: DataLoader(
        make_data(), BATCH, sampler=RandomSampler(make_data(), replacement=True, num_samples=40)
    ),
    "weighted": lambda: DataLoader(
        make_data(), BATCH, sampler=WeightedRandomSampler(list(range(1, 23)), 22)
    ),
    "subset": lambda: DataLoader(make_data(), BATCH, sampler=SubsetRandomSampler(range(18))),
    "python's shuffle": lambda: DataLoader(make_data(), BATCH, sampler=PythonShuffled()),
    "own batch sampler": lambda: DataLoader(
        make_data(), batch_sampler=BatchSampler(RandomSampler(make_data()), BATCH, drop_last=True)
    ),
    "without batching": _without_batching,
    "stream": lambda: DataLoader(Stream(), BATCH),
}


class Noisy:
    """A callback with a state that changes what is trained."""

    def __init__(self) -> None:
        self.calls = 0

    def next_due(self, progress: Any) -> int:
        return int(progress.step) + 1

    def at(self, border: Border, run: Run) -> None:
        if "due" in border.kind:
            self.calls += 1
            with torch.no_grad():
                for _, parameter in run.model.named_parameters():
                    parameter.add_(0.001 * self.calls)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = state["calls"]


def milestones(optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """A schedule whose state has integer keys."""
    return MultiStepLR(optimizer, [2, 5, 9], gamma=0.5)


def every_step() -> ModelCheckpoint:
    """Checkpoints after every step, all kept."""
    return ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)


def forget() -> None:
    """Leave random states as no run would find them: a fresh process has other ones."""
    torch.manual_seed(SEED)
    torch.rand(17)
    np.random.seed(99)
    random.seed(99)


def quiet_trainer(root: str | Path, *, callbacks: Any = None, **settings: Any) -> Trainer:
    """A Trainer that writes checkpoints and nothing else."""
    given: dict[str, Any] = {
        "data": use("torch", batch_size=BATCH),
        "default_root_dir": root,
        "callbacks": every_step() if callbacks is None else callbacks,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "seed": SEED,
    }
    return Trainer(**{**given, **settings})


def fit(
    trainer: Trainer,
    *,
    data: str = "dataset",
    optimizer: str = "sgd",
    scheduler: bool = True,
    model: nn.Module | None = None,
    ckpt_path: Any = None,
    **more: Any,
) -> tuple[dict[str, Tensor], Result]:
    """Train a model and return its weights with the result."""
    model = make_model() if model is None else model
    result = trainer.fit(
        model,
        DATA[data](),
        loss=F.cross_entropy,
        optimizer=OPTIMIZERS[optimizer],
        lr_scheduler=milestones if scheduler else None,
        ckpt_path=ckpt_path,
        **more,
    )
    return weights(model), result


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def different(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise equal."""
    return [name for name in left if not torch.equal(left[name], right[name])]


def saved(root: str | Path) -> list[Path]:
    """All checkpoints under ``root`` by step."""
    return sorted(Path(root).glob("*/step-*"), key=lambda path: int(path.name.split("-")[1]))


def left_over(root: str | Path) -> list[str]:
    """Names of what a write leaves when it is not finished or not cleaned up."""
    # A walk goes on where a directory is renamed under it; a glob of Python 3.11 raises.
    found = [name for _, folders, files in os.walk(root) for name in (*folders, *files)]
    return [name for name in found if name.startswith(".")]

"""Small trainings for the tests of wrong and unusual use, and the same by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchweld import Trainer, use
from torchweld.testing import empty_registry

M = TypeVar("M", bound=nn.Module)

BATCH = 4
SGD_FACTORY = partial(SGD, lr=0.1, momentum=0.9)


def make_data(num_samples: int = 24) -> TensorDataset:
    """Vectors of 5 numbers in three classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


def make_loader(num_samples: int = 24, **options: Any) -> DataLoader[Any]:
    """Batches of 4 in order."""
    return DataLoader(make_data(num_samples), BATCH, **options)


def make_model() -> nn.Sequential:
    """Deterministic: what it trains depends on the batches only."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def make_net() -> nn.Sequential:
    """BatchNorm and dropout: state of its own, and random numbers in every forward."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


class Stream(IterableDataset[Any]):
    """The data as a stream without a length."""

    def __init__(self, num_samples: int = 24) -> None:
        self.data = make_data(num_samples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def make_trainer(**settings: Any) -> Trainer:
    """A Trainer that writes and prints nothing, of built-ins only."""
    return Trainer(**{"barebones": True, "registry": empty_registry(), **settings})


def of_dataset(batch_size: int = BATCH, **options: Any) -> Any:
    """The data source for a Dataset."""
    return use("torch", batch_size=batch_size, **options)


def arguments(**changed: Any) -> dict[str, Any]:
    """What ``fit`` and ``prepare`` are given beside model and data."""
    return {"loss": F.cross_entropy, "optimizer": SGD_FACTORY, **changed}


def fit(model: nn.Module, train: Any, val: Any = None, *, settings: Any = None, **more: Any) -> Any:
    """Train with a Trainer of ``settings`` and return the result."""
    return make_trainer(**(settings or {})).fit(model, train, val, **arguments(**more))


def train_by_hand(model: M, windows: Iterable[list[Any]]) -> M:
    """One step for each list of batches, their gradients averaged."""
    optimizer = SGD_FACTORY(model.parameters())
    model.train()
    for window in windows:
        for inputs, targets in window:
            loss = F.cross_entropy(model(inputs), targets)
            (loss / len(window) if len(window) > 1 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def different(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise equal."""
    return [name for name in left if not torch.equal(left[name], right[name])]


def assert_same(left: nn.Module, right: nn.Module) -> None:
    """Compare two models bitwise."""
    assert different(weights(left), weights(right)) == []

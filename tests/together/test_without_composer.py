"""FFCV and a user's own functions under every strategy, against plain PyTorch by hand: bitwise.

Without Composer, which asks for torch below 2.7.1, and without torchvision: this is what goes with
the newest torch, and the session ``newest`` runs it there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from torchweld import Claims, Component, Trainer, use
from torchweld.interfaces import Parts
from torchweld.testing import run_ranks

SECONDS = 200.0
SEED = 3
EPOCHS = 2
CLASSES = 4
GLOBAL_BATCH = 8
STRATEGIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fairscale_oss": ("fairscale_oss", {}),
    "fairscale_sdp": ("fairscale_sdp", {}),
    "ZeRO-1": ("deepspeed", {"stage": 1}),
    "ZeRO-2": ("deepspeed", {"stage": 2}),
    "ZeRO-3": ("deepspeed", {"stage": 3, "persistence_threshold": 100}),
}

smooth_cross_entropy = partial(F.cross_entropy, label_smoothing=0.1)
make_sgd = partial(SGD, lr=0.1, momentum=0.9)


class Pictures(Dataset[Any]):
    """Height x width x 3 bytes and a class, as most files hold them."""

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        self.pixels = random.integers(0, 256, (24, 8, 8, 3), np.uint8)
        self.labels = random.integers(0, CLASSES, 24).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.pixels[index], self.labels[index]


class Tensors(Pictures):
    """The same as a loop by hand needs them."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = super().__getitem__(index)
        return torch.from_numpy(pixels).permute(2, 0, 1).float() * (1 / 255), label


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.1),
        nn.Flatten(), nn.Linear(256, CLASSES),
    )  # fmt: skip


class ChannelsLast:
    """Inputs in NHWC, which FFCV is asked for."""

    memory_format = torch.channels_last

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs.contiguous(memory_format=torch.channels_last)


def mix(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Blend every picture with another of the batch, and the classes in the same shares."""
    inputs, labels = batch
    share, targets = torch.rand(()), F.one_hot(labels, CLASSES).float()
    others = inputs.flip(0), targets.flip(0)
    return share * inputs + (1 - share) * others[0], share * targets + (1 - share) * others[1]


def apply_channels_last(parts: Parts) -> Parts:
    return replace(parts, input_transforms=(*parts.input_transforms, ChannelsLast()))


def apply_mixup(parts: Parts) -> Parts:
    return replace(parts, batch_transforms=(*parts.batch_transforms, mix))


SURGERY = [
    Component(
        "mixup", "blends pictures", lambda: apply_mixup,
        claims=Claims(edits=["batch.inputs", "batch.targets"], after=["channels_last"]),
    ),
    Component(
        "channels_last", "NHWC", lambda: apply_channels_last, claims=Claims(edits=["batch.inputs"])
    ),
]  # fmt: skip


def by_trainer(name: str, options: Mapping[str, Any], cache: str) -> dict[str, Tensor]:
    size = GLOBAL_BATCH // int(os.environ["WORLD_SIZE"])
    trainer = Trainer(
        strategy=use(name, **options),
        data=use("ffcv", batch_size=size, shuffle=False, cache_dir=cache),
        surgery=SURGERY,
        max_epochs=EPOCHS,
        seed=SEED,
        accelerator="cpu",
        barebones=True,
    )
    trainer.fit(make_net(), Pictures(), loss=smooth_cross_entropy, optimizer=make_sgd)
    return load_file(trainer.export("weights.safetensors"))


def by_hand() -> dict[str, Tensor]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = make_net()
    wrapped = model
    if world_size > 1:
        dist.init_process_group("gloo")
        wrapped = DistributedDataParallel(model)
    optimizer = make_sgd(wrapped.parameters())
    data = Tensors()
    sampler: DistributedSampler[Any] = DistributedSampler(data, world_size, rank, shuffle=False)
    loader = DataLoader(data, GLOBAL_BATCH // world_size, sampler=sampler)
    torch.manual_seed(SEED + rank)
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            mixed, targets = mix((inputs.contiguous(memory_format=torch.channels_last), labels))
            smooth_cross_entropy(wrapped(mixed), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the pictures are converted once."""
    return str(tmp_path_factory.mktemp("beton"))


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """What came of the loop by hand on two processes."""
    found: dict[str, Tensor] = run_ranks(by_hand, 2, timeout_seconds=SECONDS)[0]
    return found


def different(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [name for name, weights in expected.items() if not torch.equal(found[name], weights)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_end_with_the_bits_of_the_loop_by_hand(
    strategy: str, cache: str, expected: Mapping[str, Tensor]
) -> None:
    found = run_ranks(by_trainer, 2, *STRATEGIES[strategy], cache, timeout_seconds=SECONDS)[0]

    assert different(found, expected) == []


@pytest.mark.slow
def test_one_process_ends_with_the_bits_of_the_loop_by_hand(cache: str) -> None:
    (expected,) = run_ranks(by_hand, 1, timeout_seconds=SECONDS)

    (found,) = run_ranks(by_trainer, 1, "single", {}, cache, timeout_seconds=SECONDS)

    assert different(found, expected) == []

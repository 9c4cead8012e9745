"""Two processes: every sample once, in step, and training equal to a DataLoader's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset

import torchweld_ffcv
from tests.ffcv.reading import load, photos, write
from torchweld import Trainer, use
from torchweld.processes.ranks import launch
from torchweld.registry import Registry
from torchweld.testing import run_ranks
from torchweld_ffcv import image

SPEC = {"image": image(crop="random_resized", size=16, flip=0.5)}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 JPEG photos of several sizes."""
    return write(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", photos(27), store="jpeg")


# ---- which samples -------------------------------------------------------------------------------


def real_labels(loader: Any) -> list[int]:
    return [n for batch in loader for n in batch[1][: loader.samples(batch)].tolist()]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_every_sample_out_once_and_get_equally_many_batches(
    jpegs: Path, world_size: int, train: bool
) -> None:
    loaders = [
        load(jpegs, train=train, batch_size=4, rank=r, world_size=world_size, spec=SPEC)
        for r in range(world_size)
    ]

    assert sorted(n for loader in loaders for n in real_labels(loader)) == list(range(27))
    assert len({len(loader) for loader in loaders}) == 1
    assert {loader.num_samples for loader in loaders} == {27}


def test_pixels_do_not_depend_on_the_number_of_ranks(jpegs: Path) -> None:
    def pixels(world_size: int) -> dict[int, Tensor]:
        loaders = [
            load(jpegs, batch_size=4, rank=r, world_size=world_size, spec=SPEC)
            for r in range(world_size)
        ]
        return {
            int(label): picture
            for loader in loaders
            for images, targets in loader
            for picture, label in zip(images, targets, strict=True)
        }

    alone, shared = pixels(1), pixels(2)

    assert all(torch.equal(alone[number], shared[number]) for number in range(27))


def read_out_of_step(path: Path) -> list[int]:
    """Rank 0 looks at a batch first; then all read an epoch."""
    env = launch("cpu").env
    loader = load(path, batch_size=4, rank=env.rank, world_size=env.world_size, spec=SPEC)
    if env.rank == 0:
        next(iter(loader))
    loader.set_epoch(1)
    return real_labels(loader)


def test_one_more_iterator_on_rank_0_does_not_shift_the_epoch(jpegs: Path) -> None:
    first, second = run_ranks(read_out_of_step, 2, jpegs)

    assert sorted(first + second) == list(range(27))


# ---- training ------------------------------------------------------------------------------------


class Pictures(Dataset[Any]):
    """Float pictures, as after ToTensor."""

    def __init__(self, count: int) -> None:
        self.pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        return self.pixels[index], index % 5


def count(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return (outputs.argmax(1) == targets).sum(), len(targets)


def train(data: Any, *, ckpt_path: str | None = None, **settings: Any) -> Any:
    """Weights and metrics after a training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    trainer = Trainer(
        strategy="ddp",
        data=data,
        registry=Registry({"ffcv": torchweld_ffcv}),
        seed=3,
        accelerator="cpu",
        enable_progress_bar=False,
        **{"max_epochs": 2, **settings},
    )
    result = trainer.fit(
        model,
        Pictures(53),
        Pictures(21),
        loss=F.cross_entropy,
        metrics={"accuracy": count},
        optimizer=partial(SGD, lr=0.1),
        ckpt_path=ckpt_path,
    )
    return [p.detach().clone() for p in model.parameters()], dict(result.metrics)


def choice(name: str, directory: Path) -> Any:
    more = {"cache_dir": str(directory)} if name == "ffcv" else {}
    return use(name, batch_size=8, **more)


def train_with(name: str, directory: Path) -> Any:
    return train(choice(name, directory), default_root_dir=str(directory))


def test_training_and_metrics_are_those_of_a_dataloader(tmp_path: Path) -> None:
    ours, theirs = (run_ranks(train_with, 2, name, tmp_path / name) for name in ("ffcv", "torch"))

    for (weights, metrics), (expected, expected_metrics) in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
        for name in ("val_accuracy", "val_loss"):
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-6)


def interrupted(directory: Path) -> Any:
    """Stop in the middle of the second epoch, and go on with a fresh Trainer."""
    data = choice("ffcv", directory)
    train(data, default_root_dir=str(directory), max_steps=6)
    return train(data, default_root_dir=str(directory), ckpt_path="last")[0]


def test_a_training_goes_on_in_the_middle_of_an_epoch_bit_for_bit(tmp_path: Path) -> None:
    whole = run_ranks(train_with, 2, "ffcv", tmp_path / "whole")

    resumed = run_ranks(interrupted, 2, tmp_path / "parts")

    for (weights, _), after in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))

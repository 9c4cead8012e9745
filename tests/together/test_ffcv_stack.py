"""All packages in one run: ffcv reads, Composer changes, two processes train, whole or sharded."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset
from torchvision.transforms import v2

from tests.core.forking import Forks, forked_ranks
from tests.core.killing import contents, wait_for_save
from torchweld import Trainer, use
from torchweld.callbacks import ModelCheckpoint
from torchweld.checkpoint import last
from torchweld.testing import run_ranks

NUM_SAMPLES = 5003  # 9 whole batches of 256 on each of two processes, and one of 395 samples
STRATEGIES = ["ddp", "fsdp"]
PATIENCE_SECONDS = 200.0


class Pictures(Dataset[Any]):
    """Small pictures, each of a class of its own: a label says which sample it is."""

    def __init__(self, seed: int) -> None:
        shape = (NUM_SAMPLES, 3, 8, 8)
        random = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        self.transform = v2.ToDtype(torch.float32, scale=True)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.pixels[index]
        return pixels if self.transform is None else self.transform(pixels), index


class Seen:
    """A metric: which samples this process was shown."""

    def __init__(self) -> None:
        self.labels: list[int] = []

    def reset(self) -> None:
        self.labels = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        assert len(outputs) == len(targets)
        self.labels += targets.tolist()

    def compute(self) -> float:
        return float(len(self.labels))

    def sync(self) -> None:
        """Left out: the test puts the processes together."""


class Losses:
    """A logger that keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if "train_loss" in metrics:
            self.values.append(metrics["train_loss"])


def fit(strategy: str, data: Any, folder: Path, **settings: Any) -> tuple[Any, Seen]:
    """Train a small network; returns the result and what validation saw here."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, NUM_SAMPLES)
    )
    seen = Seen()
    trainer = Trainer(
        strategy=strategy,
        data=data,
        surgery=["cutmix", "label_smoothing"],
        seed=3,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        **{"logger": False, **settings},
    )
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    ckpt_path = "last" if list(folder.glob("*/step-*")) else None
    result = trainer.fit(
        model, Pictures(1), Pictures(2), loss=F.cross_entropy, optimizer=optimizer,
        metrics={"seen": seen}, ckpt_path=ckpt_path,
    )  # fmt: skip
    return result, seen


def choice(name: str, cache: Path) -> Any:
    return use(name, batch_size=256, **({"cache_dir": str(cache)} if name == "ffcv" else {}))


# ---- the same losses, every sample once ----------------------------------------------------------


def train(strategy: str, name: str, folder: Path) -> tuple[list[float], float, list[int]]:
    """Losses of all steps, validation loss, and the samples that validation saw here."""
    losses = Losses()
    data = choice(name, folder / "cache")
    result, seen = fit(strategy, data, folder / name, logger=losses, log_every_n_steps=1)
    return losses.values, result.metrics["val_loss"], seen.labels


@pytest.fixture(scope="module", params=STRATEGIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes end with under a strategy, by ffcv and by a DataLoader."""
    folder = tmp_path_factory.mktemp(request.param)
    return tuple(
        run_ranks(train, 2, request.param, name, folder, timeout_seconds=PATIENCE_SECONDS)
        for name in ("ffcv", "torch")
    )


@pytest.mark.slow
def test_losses_are_those_of_a_dataloader(both: Any) -> None:
    (ours, our_val, _), (theirs, their_val, _) = (ranks[0] for ranks in both)

    assert len(ours) == 10
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
    assert our_val == pytest.approx(their_val, rel=0, abs=1e-6)


@pytest.mark.slow
def test_validation_counts_every_sample_once(both: Any) -> None:
    (_, _, first), (_, _, second) = both[0]

    assert sorted(first + second) == list(range(NUM_SAMPLES))


# ---- kill -9 -------------------------------------------------------------------------------------


def train_and_save(strategy: str, cache: Path) -> None:
    """Be one rank of a run that saves every second step under ``runs``."""
    torch.set_num_threads(1)
    saver = ModelCheckpoint(every_n_train_steps=2, async_save=True)
    fit(strategy, choice("ffcv", cache), Path("runs"), max_steps=26, callbacks=saver)


def end_of(place: Path, strategy: str, cache: Path) -> Any:
    """Run to the end, from the newest checkpoint in ``place`` if there is one; what it saved."""
    place.mkdir(exist_ok=True)
    with forked_ranks(train_and_save, 2, strategy, cache, directory=place) as processes:
        assert processes.codes(PATIENCE_SECONDS) == [0, 0], said(processes)
    found, skipped = last(place / "runs")
    assert found is not None
    assert skipped == []
    return contents(found)


def said(processes: Forks) -> str:
    return "\n".join(f"rank {rank}: {processes.output(rank)}" for rank in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_goes_on_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    cache, place = tmp_path / "cache", tmp_path / "killed"
    expected = end_of(tmp_path / "whole", strategy, cache)
    place.mkdir()
    with forked_ranks(train_and_save, 2, strategy, cache, directory=place) as processes:
        wait_for_save(place / "runs", processes, 3)
        for rank in range(2):
            processes.kill(rank)
        codes = processes.codes(PATIENCE_SECONDS)
    assert codes == [-signal.SIGKILL] * 2, said(processes)

    assert end_of(place, strategy, cache) == expected
    assert "resum" in said(processes)


# ---- the memory format ---------------------------------------------------------------------------


class Convolution(nn.Module):
    """Notes whether what it is given has the NHWC memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, NUM_SAMPLES))
        self.formats: set[tuple[bool, bool]] = set()

    def forward(self, images: Tensor) -> Tensor:
        is_last = images.is_contiguous(memory_format=torch.channels_last)
        self.formats.add((self.training, is_last))
        out: Tensor = self.layers(images)
        return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "surgery", [[], ["channels_last"], [use("channels_last", weights=False)]], ids=str
)
def test_batches_have_the_memory_format_that_the_model_wants(
    surgery: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = Convolution(), Pictures(1)
    trainer = Trainer(
        strategy="single", data=choice("ffcv", tmp_path), surgery=surgery, max_steps=1,
        accelerator="cpu", logger=False, enable_checkpointing=False,
    )  # fmt: skip

    optimizer = partial(SGD, lr=0.1)
    trainer.fit(model, data, data, loss=F.cross_entropy, optimizer=optimizer)
    trainer.evaluate(data=data, loss=F.cross_entropy)

    assert model.formats == {(True, bool(surgery)), (False, bool(surgery))}
    said = capsys.readouterr()
    made = "float32 channels_last in [0, 1]" in said.out + said.err  # by the loader, not afterwards
    assert made == bool(surgery)

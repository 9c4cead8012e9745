"""What one step costs beside forward, backward and update: torchweld and other trainers.

All of them train the same small network on the same batches, interleaved, for several rounds. The
dataset is the clock: time and calls are counted between two of its fetches, so that nobody's set-up
is in the numbers and no trainer had to be changed.

    python benchmarks/overhead.py [--steps 300] [--rounds 30] [--only torchweld]
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 16
WARMUP = 50  # steps before the clock starts
PACKAGES = ["torchweld", "torch", "lightning", "accelerate", "pytorch-ignite"]


@dataclass
class Meter:
    """Measures the steps between two fetches.

    Attributes:
        steps: how many are measured, after ``WARMUP``.
        counts: whether Python calls are counted instead of time.
    """

    steps: int
    counts: bool
    fetches: int = 0
    calls: int = 0
    seconds: float = 0.0

    def tick(self) -> None:
        """Notice that a batch is fetched."""
        self.fetches += 1
        if self.fetches == WARMUP:
            self._start()
        elif self.fetches == WARMUP + self.steps:
            self._stop()

    def _start(self) -> None:
        self.seconds = -time.process_time()
        if self.counts:
            sys.setprofile(self._count)

    def _stop(self) -> None:
        sys.setprofile(None)
        self.seconds += time.process_time()

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.calls += event == "call"


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Random samples, handed out a batch at a time; every fetch is a tick of the meter."""

    def __init__(self, meter: Meter) -> None:
        generator = torch.Generator().manual_seed(0)
        # One batch more than is measured: some trainers fetch the next one early.
        size = (WARMUP + meter.steps + 2) * BATCH_SIZE
        self.inputs = torch.randn(size, 32, generator=generator)
        self.targets = torch.randint(10, (size,), generator=generator)
        self.meter = meter

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample, for whoever looks at the first."""
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch."""
        self.meter.tick()
        return self.inputs[indices], self.targets[indices]


def as_is(batch: Any) -> Any:
    """Collate nothing: ``Samples`` gives whole batches."""
    return batch


@dataclass(frozen=True)
class Job:
    """What every trainer is given."""

    model: nn.Module
    loader: DataLoader[tuple[Tensor, Tensor]]
    folder: Path


def by_hand(job: Job) -> None:
    """The loop that everything is compared with."""
    optimizer = SGD(job.model.parameters(), lr=0.01)
    for inputs, targets in job.loader:
        loss = F.cross_entropy(job.model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def torchweld_fit(job: Job, *, barebones: bool) -> None:
    """``Trainer.fit``."""
    from torchweld import Trainer

    trainer = Trainer(
        strategy="single", max_epochs=1, barebones=barebones, default_root_dir=job.folder
    )
    factory = partial(SGD, lr=0.01)
    trainer.fit(job.model, train=job.loader, loss=F.cross_entropy, optimizer=factory)


def torchweld_own_loop(job: Job) -> None:
    """``Trainer.prepare`` with everything on."""
    from torchweld import Trainer

    trainer = Trainer(strategy="single", max_epochs=1, default_root_dir=job.folder)
    factory = partial(SGD, lr=0.01)
    with trainer.prepare(
        job.model, train=job.loader, loss=F.cross_entropy, optimizer=factory
    ) as run:
        for inputs, targets in run.batches():
            run.backward(run.loss(run.model(inputs), targets))
            run.step()


def fabric(job: Job) -> None:
    """Lightning Fabric: an own loop."""
    from lightning.fabric import Fabric

    own = Fabric(accelerator="cpu", devices=1)
    model, optimizer = own.setup(job.model, SGD(job.model.parameters(), lr=0.01))
    for inputs, targets in own.setup_dataloaders(job.loader):
        own.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()


def accelerate(job: Job) -> None:
    """Accelerate: an own loop."""
    from accelerate import Accelerator

    own = Accelerator(cpu=True)
    optimizer = SGD(job.model.parameters(), lr=0.01)
    model, optimizer, loader = own.prepare(job.model, optimizer, job.loader)
    for inputs, targets in loader:
        own.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    own.free_memory()


def ignite(job: Job) -> None:
    """Ignite's supervised trainer without handlers."""
    from ignite.engine import create_supervised_trainer

    optimizer = SGD(job.model.parameters(), lr=0.01)
    create_supervised_trainer(job.model, optimizer, F.cross_entropy).run(job.loader, max_epochs=1)


def lightning(job: Job, *, logs: bool = False, **flags: Any) -> None:
    """Lightning's Trainer with these flags, the loss logged to bar and logger or not at all."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            if logs:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> SGD:
            return SGD(self.parameters(), lr=0.01)

    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, default_root_dir=job.folder, **flags
    )
    trainer.fit(Module(), job.loader)


OFF: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
TRAINERS: dict[str, Callable[[Job], None]] = {
    "PyTorch, by hand": by_hand,
    "torchweld fit, extras on (the default)": partial(torchweld_fit, barebones=False),
    "torchweld fit, barebones": partial(torchweld_fit, barebones=True),
    "torchweld own loop, extras on": torchweld_own_loop,
    "Fabric": fabric,
    "ignite": ignite,
    "Accelerate": accelerate,
    "Lightning, barebones": partial(lightning, barebones=True),
    "Lightning, extras off": partial(lightning, **OFF),
    "Lightning, defaults": lightning,
    "Lightning, defaults and self.log": partial(lightning, logs=True),
}


@contextmanager
def silence() -> Iterator[None]:
    """Bars are drawn and lines are written, but nobody sees them."""
    with Path(os.devnull).open("w", encoding="utf-8") as sink:  # noqa: SIM117 - one line each
        with redirect_stdout(sink), redirect_stderr(sink):
            yield


def measure(train: Callable[[Job], None], *, steps: int, counts: bool) -> Meter:
    """Train once and return what the steps took."""
    meter = Meter(steps, counts)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    loader = DataLoader(Samples(meter), batch_size=BATCH_SIZE, shuffle=True, collate_fn=as_is)
    with tempfile.TemporaryDirectory() as folder, silence():
        train(Job(model, loader, Path(folder)))
    return meter


def run_rounds(names: list[str], *, steps: int, rounds: int) -> dict[str, list[float]]:
    """CPU microseconds a step of every trainer in every round; the order rotates."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            meter = measure(TRAINERS[name], steps=steps, counts=False)
            times[name].append(1e6 * meter.seconds / steps)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return times


def table(times: dict[str, list[float]], calls: dict[str, float]) -> str:
    """What a step takes, in Markdown: medians, and the fastest round, which nothing slowed.

    Differences and ratios are taken inside a round, before the median.
    """
    bare = next(iter(times))
    lines = [
        "| trainer | calls | above by hand | µs (fastest) | above by hand (fastest) | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in times.items():
        above = statistics.median(a - b for a, b in zip(row, times[bare], strict=True))
        ratio = statistics.median(a / b for a, b in zip(row, times[bare], strict=True))
        lines.append(
            f"| {name} | {calls[name]:.1f} | {calls[name] - calls[bare]:+.1f} "
            f"| {statistics.median(row):.0f} ({min(row):.0f}) "
            f"| {above:+.1f} ({min(row) - min(times[bare]):+.1f}) | {ratio:.3f} |"
        )
    return "\n".join(lines)


def version_of(package: str) -> str:
    """The package and its version, or that it is missing."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def versions() -> str:
    """What was measured, in one line."""
    return ", ".join([f"Python {platform.python_version()}", *map(version_of, PACKAGES)])


def works(name: str) -> bool:
    """Whether this trainer is installed; says so when it is not."""
    try:
        measure(TRAINERS[name], steps=1, counts=False)
    except ImportError as error:
        print(f"left out: {name} ({error})", file=sys.stderr)
        return False
    return True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What one step costs beside other trainers.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="trainers with this word in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    bare = next(iter(TRAINERS))
    names = [name for name in TRAINERS if (options.only in name or name == bare) and works(name)]
    calls = {}
    for name in names:
        meter = measure(TRAINERS[name], steps=options.steps, counts=True)
        calls[name] = meter.calls / options.steps
    times = run_rounds(names, steps=options.steps, rounds=options.rounds)
    print(table(times, calls))
    print(f"\n{versions()}; one thread, CPU time; `{' '.join(['python', *sys.argv])}`")


if __name__ == "__main__":
    main()

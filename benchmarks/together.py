"""What each optimization brings to one training, and what all of them bring together.

A small ResNet is trained on JPEG files in two processes: by hand (DistributedDataParallel and a
DataLoader), the same by a Trainer ("plain"), with each optimization alone, and with all of them.
After each has taken two steps, so that code is imported and compiled, they take turns for several
rounds in the same processes, clocked between the parts of every step::

    python -m benchmarks.together [--rounds 5] [--images 1000]

It ends with the tables of ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.scratch import scratch, terminable
from benchmarks.together_report import print_report
from examples.article import RANK, write_images
from torchweld import Trainer, use

if TYPE_CHECKING:
    from torchweld.loop.run import TrainingRun

BATCH = 32  # images a process and step
SIZE = 96  # pixels of what is trained on; the files have 192
WIDTH = 24  # channels of the first block
STAGES = ("data", "batch", "forward", "loss", "backward", "step")
SURGERIES = ("blurpool", "channels_last", "cutmix", "label_smoothing")
# name: strategy, data, surgeries
CHOICES: Mapping[str, tuple[str, str, Sequence[str]]] = {
    "plain": ("ddp", "torch", ()),
    "ffcv": ("ddp", "ffcv", ()),
    "deepspeed": ("deepspeed", "torch", ()),
    "fsdp": ("fsdp", "torch", ()),
    **{name: ("ddp", "torch", (name,)) for name in SURGERIES},
    "all, deepspeed": ("deepspeed", "ffcv", SURGERIES),
    "all, fsdp": ("fsdp", "ffcv", SURGERIES),
}
BY_HAND = "by hand"
make_optimizer = partial(AdamW, lr=1e-3)


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, wider, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(wider), nn.BatchNorm2d(wider)
        around = [nn.Conv2d(width, wider, 1, stride, bias=False), nn.BatchNorm2d(wider)]
        self.around = nn.Sequential(*around) if width != wider else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """``(batch, width, side, side)`` to ``(batch, wider, side / stride, side / stride)``."""
        hidden = F.relu(self.norm1(self.conv1(inputs)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.around(inputs))


def make_model() -> nn.Module:
    """A ResNet of four blocks, 0.7 M parameters; what is strided in it will be blurred.

    It is narrow and its images large, so that a parameter takes part in about as many operations a
    step as in a ResNet-50 on large images: what a strategy does is paid for each parameter.
    """
    torch.manual_seed(1)
    widths = [WIDTH, WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH]
    blocks = [Block(width, wider, 1 if width == wider else 2) for width, wider in pairwise(widths)]
    stem = nn.Conv2d(3, WIDTH, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(
        stem, nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * WIDTH, 10),
    )  # fmt: skip


def load_images(folder: Path) -> ImageFolder:
    """The usual data set of torchvision: a DataLoader reads it, and FFCV takes it over."""
    changes = [
        v2.RandomResizedCrop(SIZE, scale=(0.6, 1.0), antialias=True),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.3] * 3),
    ]
    return ImageFolder(str(folder), transform=v2.Compose(changes))


# ---- the clock -----------------------------------------------------------------------------------


@dataclass
class Clock:
    """What one training was seen to do.

    The first step is in none of the sums: worker processes and threads begin in it.

    Attributes:
        wall: seconds of each stage, on the clock.
        cpu: seconds of one core in each stage, of the thread that trains.
        beside: seconds of one core of everything else: worker processes, threads that read, the
            exchange between processes.
        images: of this process.
        images_beside: the same with the first step, which ``beside`` cannot leave out.
        losses: of each step.
        first: seconds from the start of the run to its first batch.
        held: bytes of weights and optimizer state on this process.
        peak: bytes of memory that this process took at most, above what it had before.
    """

    wall: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    cpu: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    beside: float = 0.0
    images: int = 0
    images_beside: int = 0
    losses: list[float] = field(default_factory=list)
    first: float = 0.0
    held: int = 0
    peak: int = 0
    _marks: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """Start, or start again after what does not count."""
        self._marks = time.perf_counter(), time.thread_time()

    def restart(self) -> None:
        """Forget all stages so far."""
        self.wall, self.cpu, self.images = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0), 0
        self.begin()

    def end(self, stage: str) -> None:
        """Since the last mark it was ``stage``."""
        wall, cpu = self._marks
        self.begin()
        self.wall[stage] += self._marks[0] - wall
        self.cpu[stage] += self._marks[1] - cpu


def all_cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def reset_peak() -> None:
    """Make the kernel forget how much memory this process has had."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return


def memory(kind: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most; 0 where that is not known."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith(kind)]
    return 1024 * int(found[0]) if found else 0


@contextmanager
def clocked() -> Iterator[Clock]:
    """A clock around one training; what runs beside it is known when its workers have ended."""
    clock = Clock()
    reset_peak()
    memory_before, all_before, own_before = memory("VmRSS"), all_cpu_seconds(), time.thread_time()
    yield clock
    clock.beside = (all_cpu_seconds() - all_before) - (time.thread_time() - own_before)
    clock.peak = memory("VmHWM") - memory_before


# ---- trainings -----------------------------------------------------------------------------------


def read(batches: Iterator[Any], clock: Clock, began: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, with the stages ``data`` (and, by a Trainer, ``batch``) before each."""
    for step in range(sys.maxsize):
        if step == 1:  # the first step and all before it do not count
            clock.restart()
        batch = next(batches, None)
        if batch is None:
            return
        if step == 0:
            clock.first = time.perf_counter() - began
        clock.end("data")
        clock.images += len(batch[0])
        clock.images_beside += len(batch[0])
        yield batch


def train_by_hand(data: ImageFolder, steps: int | None = None) -> Clock:
    """Plain PyTorch, as its tutorials have it."""
    with clocked() as clock:
        began = time.perf_counter()
        sampler: DistributedSampler[Any] = DistributedSampler(data, seed=1)
        loader = DataLoader(data, BATCH, sampler=sampler, num_workers=1)
        model = DistributedDataParallel(make_model())
        optimizer = make_optimizer(model.parameters())
        clock.begin()
        for step, (inputs, targets) in enumerate(read(iter(loader), clock, began), start=1):
            outputs = model(inputs)
            clock.end("forward")
            loss = F.cross_entropy(outputs, targets)
            clock.end("loss")
            loss.backward()
            clock.end("backward")
            optimizer.step()
            optimizer.zero_grad()
            clock.end("step")
            clock.losses.append(loss.item())
            clock.begin()
            if step == steps:
                break
        state = [value for each in optimizer.state.values() for value in each.values()]
        tensors = [*model.parameters(), *(value for value in state if value.dim() > 0)]
        clock.held = sum(each.nbytes for each in tensors)
    return clock


def train(name: str, data: ImageFolder, folder: Path, steps: int | None = None) -> Clock:
    """The same by a Trainer, with what is chosen."""
    strategy, source, surgery = CHOICES[name]
    sources = {
        "torch": use("torch", batch_size=BATCH, num_workers=1),
        "ffcv": use("ffcv", batch_size=BATCH, cache_dir=str(folder / "converted")),
    }
    trainer = Trainer(
        strategy=strategy,
        data=sources[source],
        surgery=list(surgery),
        max_epochs=1,
        limit_train_batches=steps,
        accelerator="cpu",
        barebones=True,
        seed=1,
    )
    with clocked() as clock:
        began = time.perf_counter()
        given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": make_optimizer}
        with trainer.prepare(make_model, data, **given) as run:
            _clock_transform(run, clock)
            clock.begin()
            for inputs, targets in read(run.batches(), clock, began):
                outputs = run.model(inputs)
                clock.end("forward")
                loss = run.loss(outputs, targets)
                clock.end("loss")
                run.backward(loss)
                clock.end("backward")
                run.step()
                clock.end("step")
                clock.losses.append(loss.item())
                clock.begin()
            held = run.model.bytes_per_rank()
            clock.held = held["parameters"] + held["optimizer"]
    return clock


def _clock_transform(run: TrainingRun, clock: Clock) -> None:
    """Tell what surgeries do to a batch from its reading."""
    feed = run.wiring.feed
    transform = feed.transform
    if transform is None:
        return

    def timed(batch: Any) -> Any:
        clock.end("data")
        batch = transform(batch)
        clock.end("batch")
        return batch

    feed.transform = timed
    feed.batches = map(timed, feed._raw)


# ---- all of them ---------------------------------------------------------------------------------


def in_turn(names: list[str], number: int) -> list[str]:
    """The order of one round: ``plain`` three times, as every ratio is one to it."""
    at = number * 4 % len(names)
    others = [name for name in names[at:] + names[:at] if name != "plain"]
    third = len(others) // 3
    return [
        "plain", *others[:third], "plain", *others[third : 2 * third], "plain", *others[2 * third :]
    ]  # fmt: skip


def measure(options: Any, folder: Path) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    train_folder, _ = write_images(folder, options.images)
    data = load_images(train_folder)
    trainings: dict[str, Callable[..., Clock]] = {BY_HAND: partial(train_by_hand, data)}
    trainings |= {name: partial(train, name, data, folder) for name in CHOICES}
    clocks: dict[str, list[Clock]] = {name: [] for name in trainings}
    for name in trainings:
        trainings[name](steps=2)
    for number in range(options.rounds):
        for name in in_turn(list(trainings), number):
            clocks[name].append(trainings[name]())
            torch.distributed.barrier()
            if RANK == 0:
                seconds = sum(clocks[name][-1].wall.values())
                print(f"round {number + 1}  {name:16}{seconds:8.2f} s", file=sys.stderr, flush=True)
    if RANK == 0:
        parts = {f"all, {each}": ("ffcv", each, *SURGERIES) for each in ("deepspeed", "fsdp")}
        print_report(clocks, parts, BATCH)
        said = " ".join(f"--{key} {getattr(options, key)}" for key in ("rounds", "images"))
        packages = ("torch", "deepspeed", "ffcv", "mosaicml")
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        print(f"\nPython {platform.python_version()}, {versions}; {said}; medians")


def main() -> None:
    """Start two processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options, options.folder)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with terminable(), scratch() as folder:
        command = [*launcher, "-m", "benchmarks.together", *sys.argv[1:], f"--folder={folder}"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=Path(__file__).parents[1], env=environ, check=True)


if __name__ == "__main__":
    main()

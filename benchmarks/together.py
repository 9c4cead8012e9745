"""What each optimization brings to one training, and what all of them bring together.

A network is trained on JPEG files in two processes: plainly, with each optimization alone, and
with all of them. After each has taken two steps, so that code is imported and compiled, they take
turns for several rounds in the same processes, clocked between the parts of every step::

    python -m benchmarks.together [--rounds 2] [--epochs 3] [--images 1797]
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from examples.article import (
    BATCH,
    RANK,
    load_images,
    make_model,
    make_optimizer,
    write_images,
)
from torchweld import Trainer, use

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

STAGES = ("data", "forward", "backward", "step")
DATA = {"torch": use("torch", batch_size=BATCH, num_workers=1)}
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


@dataclass
class Clock:
    """What one training was seen to do.

    Attributes:
        seconds: of each stage.
        cpu: seconds of one core, of this process and its workers.
        images: of this process.
        losses: of the last epoch.
        first: seconds from the start of the run to its first batch.
        held: bytes of weights and optimizer state on this process.
        peak: bytes of memory that this process took at most, above what it had before.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    cpu: float = 0.0
    images: int = 0
    losses: list[float] = field(default_factory=list)
    first: float = 0.0
    held: int = 0
    peak: int = 0

    @property
    def rate(self) -> float:
        """Images a second of all processes, which are as fast as each other."""
        return 2 * self.images / sum(self.seconds.values())

    @property
    def cpu_rate(self) -> float:
        """Images for a second of one core, which other work on the machine changes less."""
        return self.images / self.cpu


def reset_peak() -> None:
    """Make the kernel forget how much memory this process has had."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def memory(kind: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most; 0 where that is not known."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith(kind)]
    return 1024 * int(found[0]) if found else 0


def train(
    name: str, data: ImageFolder, folder: Path, *, epochs: int = 1, batches: int | None = None
) -> Clock:
    """Train once, with the clock between the parts of every step."""
    strategy, source, surgery = CHOICES[name]
    ffcv = use("ffcv", batch_size=BATCH, cache_dir=str(folder / "converted"))
    trainer = Trainer(
        strategy=strategy,
        data=DATA.get(source, ffcv),
        surgery=list(surgery),
        max_epochs=epochs,
        limit_train_batches=batches,
        accelerator="cpu",
        barebones=True,
        seed=1,
    )
    clock, steps = Clock(), math.ceil(len(data) / BATCH / 2)
    reset_peak()
    before, clock.cpu = memory("VmRSS"), -cpu_seconds()
    began = time.perf_counter()
    with trainer.prepare(make_model, data, loss=F.cross_entropy, optimizer=make_optimizer) as run:
        marks = [began]
        for step, (inputs, targets) in enumerate(run.batches()):
            marks = [marks[-1], time.perf_counter()]
            loss = run.loss(run.model(inputs), targets)
            marks.append(time.perf_counter())
            run.backward(loss)
            marks.append(time.perf_counter())
            run.step()
            marks.append(time.perf_counter())
            if step == 0:
                clock.first = marks[1] - began
            clock.images += len(inputs)
            for stage, since, now in zip(STAGES, marks, marks[1:], strict=False):
                clock.seconds[stage] += now - since
            if step >= steps * (epochs - 1):
                clock.losses.append(float(loss.detach()))
        held = run.model.bytes_per_rank()
        clock.held = held["parameters"] + held["optimizer"]
    clock.cpu += cpu_seconds()
    clock.peak = memory("VmHWM") - before
    return clock


Rates = Mapping[str, float]


def print_table(clocks: Mapping[str, Sequence[Clock]]) -> None:
    """Medians over the rounds; the first batch, memory and loss of the last one."""
    rates = {name: statistics.median(c.rate for c in each) for name, each in clocks.items()}
    cpu = {name: statistics.median(c.cpu_rate for c in each) for name, each in clocks.items()}
    heads = ("img/s", "ratio", "img/CPU-s", "ratio", "first s", "peak MB", "held MB", "loss")
    print(f"\n{'':16}" + "".join(f"{head:>10}" for head in heads))
    for name, each in clocks.items():
        last = each[-1]
        print(
            f"{name:16}{rates[name]:10,.0f}{rates[name] / rates['plain']:10.2f}"
            f"{cpu[name]:10,.0f}{cpu[name] / cpu['plain']:10.2f}{last.first:10.2f}"
            f"{last.peak / 1e6:10.0f}{last.held / 1e6:10.2f}{statistics.mean(last.losses):10.3f}"
        )
    print(f"\n{'ms a step':16}" + "".join(f"{stage:>10}" for stage in STAGES))
    for name, each in clocks.items():
        print(f"{name:16}" + "".join(f"{ms:10.1f}" for ms in stage_times(each).values()))
    for name in ("all, deepspeed", "all, fsdp"):
        print_compounding(name, rates, "second")
        print_compounding(name, cpu, "CPU-second")
        stages = stage_times(clocks[name])
        limit = max(stages, key=lambda stage: stages[stage])
        print(f"  most time: {limit}, {100 * stages[limit] / sum(stages.values()):.0f} %")


def stage_times(clocks: Sequence[Clock]) -> dict[str, float]:
    """Milliseconds of a step in each stage, medians over the rounds."""
    return {
        stage: statistics.median(1000 * c.seconds[stage] * BATCH / c.images for c in clocks)
        for stage in STAGES
    }


def print_compounding(name: str, rates: Rates, unit: str) -> None:
    """Compare all together with the product of each alone."""
    alone = [rates[each] / rates["plain"] for each in ("ffcv", CHOICES[name][0], *SURGERIES)]
    together, product = rates[name] / rates["plain"], math.prod(alone)
    print(
        f"{name}, images a {unit}: {together:.2f} times plain, product of each alone "
        f"{product:.2f}, ratio {together / product:.2f}"
    )


def measure(options: Any, folder: Path) -> None:
    """Be one of the processes."""
    train_folder, val_folder = write_images(folder, options.images)
    data, _ = load_images(train_folder, val_folder)
    clocks: dict[str, list[Clock]] = {name: [] for name in CHOICES}
    for name in CHOICES:
        train(name, data, folder, batches=2)
    for number in range(options.rounds):
        names = list(CHOICES)
        for name in names[number:] + names[:number]:
            clocks[name].append(train(name, data, folder, epochs=options.epochs))
            if RANK == 0:
                rate = clocks[name][-1].rate
                print(f"round {number + 1}  {name:16}{rate:9,.0f} images/s", flush=True)
    if RANK == 0:
        print_table(clocks)


def main() -> None:
    """Start two processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="of each")
    parser.add_argument("--images", type=int, default=1797)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options, options.folder)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, "-m", "benchmarks.together", *sys.argv[1:], f"--folder={folder}"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=Path(__file__).parents[1], env=environ, check=True)


if __name__ == "__main__":
    main()

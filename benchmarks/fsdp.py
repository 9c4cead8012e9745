"""What a step of a sharded GPT costs: torchweld's ``fsdp``, FSDP2 by hand, Lightning, and DDP.

All of them train the model of ``examples/gpt.py`` on the same batches in the same processes,
interleaved, for several rounds. As in ``overhead.py`` the dataset is the clock: time and calls are
counted between two of its fetches, on rank 0.

    python -m benchmarks.fsdp [--sizes tiny small] [--rounds 9] [--only torchweld]

It starts a process for each GPU, or two over gloo where there is none. On GPUs it computes in bf16
and adds the peak of allocated memory and the throughput.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpt_trainers import CUDA, DEVICE, TRAINERS, Job, Meter, Windows
from benchmarks.overhead import silence, version_of
from benchmarks.scratch import scratch, terminable
from examples.gpt import CONTEXT, GPT

RANK = int(os.environ.get("RANK", "0"))
PACKAGES = ["torchweld", "torchweld-fsdp", "torch", "lightning", "accelerate"]


@dataclass(frozen=True)
class Size:
    """A model and what a step of it is.

    Attributes:
        batch: windows a rank and step.
        steps: measured steps a round.
    """

    width: int
    depth: int
    heads: int
    batch: int
    steps: int


SIZES = {
    "tiny": Size(width=32, depth=3, heads=2, batch=1, steps=30),
    "small": Size(width=256, depth=6, heads=8, batch=1, steps=10),
    "large": Size(width=1024, depth=24, heads=16, batch=64, steps=20),  # for GPUs
}


def measure(
    name: str, size: Size, *, steps: int | None = None, counts: bool = False, weighs: bool = False
) -> tuple[Meter, Job]:
    """Train once and return what the steps took and held."""
    meter = Meter(steps or size.steps, counts)
    torch.manual_seed(0)
    model = GPT(size.width, size.depth, size.heads)
    with tempfile.TemporaryDirectory() as folder, silence():
        job = Job(model, Windows(meter, size.batch), size.batch, Path(folder), weighs)
        TRAINERS[name](job)
    dist.barrier()
    return meter, job


def works(name: str) -> bool:
    """Whether this trainer can run here; says so when it cannot."""
    try:
        measure(name, SIZES["tiny"], steps=1)
    except ImportError as error:
        say(f"left out: {name} ({error})")
        return False
    return True


def run_rounds(names: list[str], size: Size, rounds: int) -> dict[str, list[Meter]]:
    """What every trainer took in every round; the order rotates."""
    meters: dict[str, list[Meter]] = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            meters[name].append(measure(name, size)[0])
        say(f"round {number + 1} of {rounds}")
    return meters


def table(names: list[str], size: Size, rounds: int) -> str:
    """Calls, time and memory of a step, in Markdown; ratios are taken inside a round."""
    calls = {n: measure(n, size, counts=True)[0].calls / size.steps for n in names}
    held = {n: measure(n, size, steps=2, weighs=True)[1].held for n in names}
    meters = run_rounds(names, size, rounds)
    times = {n: [1e3 * m.seconds / size.steps for m in row] for n, row in meters.items()}
    lines = [
        "| trainer | calls | of by hand | ms (fastest) | ratio | MiB a rank |" + GPU_HEADINGS[0],
        "|---|---|---|---|---|---|" + GPU_HEADINGS[1],
    ]
    for name, row in times.items():
        ratio = statistics.median(a / b for a, b in zip(row, times[names[0]], strict=True))
        lines.append(
            f"| {name} | {calls[name]:.0f} | {calls[name] / calls[names[0]]:.2f} "
            f"| {statistics.median(row):.1f} ({min(row):.1f}) | {ratio:.3f} "
            f"| {held[name] / 2**20:.2f} |" + gpu_columns(meters[name], size)
        )
    return "\n".join(lines)


GPU_HEADINGS = (" peak MiB | bytes/s |", "---|---|") if CUDA else ("", "")


def gpu_columns(meters: list[Meter], size: Size) -> str:
    """Peak memory and throughput over all ranks; nothing on CPUs."""
    if not CUDA:
        return ""
    seconds = statistics.median(m.seconds for m in meters) / size.steps
    throughput = size.batch * CONTEXT * dist.get_world_size() / seconds
    return f" {max(m.peak for m in meters) / 2**20:.0f} | {throughput:.0f} |"


def say(text: str) -> None:
    """Tell how far it is; rank 0 alone."""
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


def versions() -> str:
    """What was measured on, in one line."""
    device = f"{torch.cuda.get_device_name()}, NCCL, bf16" if CUDA else "gloo, one thread, fp32"
    python = f"Python {platform.python_version()}"
    return ", ".join([python, *map(version_of, PACKAGES), f"{dist.get_world_size()} ranks", device])


def launch() -> int:
    """Start this program again, once for each GPU or twice."""
    processes = torch.cuda.device_count() or 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={processes}", "-m", "benchmarks.fsdp", *sys.argv[1:]]
    return subprocess.run(
        command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ).returncode


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a step of a sharded GPT costs.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="trainers with this word in their name")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        with terminable(), scratch():
            sys.exit(launch())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if CUDA:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if CUDA else "gloo")
    bare = next(iter(TRAINERS))
    names = [name for name in TRAINERS if (options.only in name or name == bare) and works(name)]
    for size in options.sizes or (["large"] if CUDA else ["tiny", "small"]):
        result = table(names, SIZES[size], options.rounds)
        if RANK == 0:
            print(f"\n{size}: {SIZES[size]}\n\n{result}", flush=True)
    if RANK == 0:
        print(f"\n{versions()}; `{' '.join(['python -m benchmarks.fsdp', *sys.argv[1:]])}`")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What a second of one core loads: the data source ffcv, stock FFCV, DataLoaders, pure decoding.

Every measurement is a process of its own that reads one epoch to get warm and then others with the
clock running, its workers included; the candidates take turns for several rounds.

    python -m benchmarks.ffcv_loading [--rounds 3] [--images 1000] [--only jpeg]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.ffcv_candidates import (
    CANDIDATES,
    MILLION,
    OF_DATA,
    Epoch,
    make_data,
    make_index,
)
from benchmarks.scratch import scratch, terminable

WANTED = [  # (data, ours, the other, at least)
    ("jpeg", "ours", "v2", 1.9),
    ("jpeg", "ours", "pil", 1.8),
    ("jpeg", "ours", "decode", 0.6),
    ("jpeg", "ours", "stock", 1.25),
    ("jpeg", "ours channels_last", "stock channels_last", 1.0),
    ("raw", "ours", "v2", 3.0),
    ("raw", "ours", "stock", 1.0),
    ("raw", "ours channels_last", "stock channels_last", 1.0),
    ("small", "ours", "v2", 20.0),
    ("small", "ours", "vectorised", 3.0),
    ("small", "ours", "stock", 2.2),
    ("small", "ours channels_last", "stock channels_last", 1.0),
]


# ---- one measurement -----------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(name: str, data: str, directory: Path) -> float:
    """Images per CPU-second of several epochs, after one to get warm."""
    epoch = _make(name, data, directory)
    epoch()
    count, cpu, end = 0, -cpu_seconds(), time.perf_counter() + 3
    while count == 0 or time.perf_counter() < end:
        count += epoch()
    return count / (cpu + cpu_seconds())


def first(name: str, data: str, directory: Path) -> float:
    """CPU-seconds until the first batch, with all imports but torch's."""
    import torch  # noqa: F401 - it is there in every training

    before = cpu_seconds()
    _make(name, data, directory)()
    return cpu_seconds() - before


def memory(name: str, data: str, directory: Path) -> float:
    """MiB that the process had at most while an epoch was read."""
    _make(name, data, directory)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def construct(name: str, data: str, directory: Path) -> float:
    """CPU-seconds to make a loader of as many samples as ImageNet has."""
    _make(name, "first", directory)  # imports
    before = cpu_seconds()
    _make(name, data, directory)
    return cpu_seconds() - before


def _make(name: str, data: str, directory: Path) -> Epoch:
    candidate, _, layout = name.partition(" ")
    return CANDIDATES[candidate](directory, data, layout)


TASKS = {"measure": measure, "first": first, "memory": memory, "construct": construct}


def in_process(task: str, name: str, data: str, directory: Path, **environ: str) -> float:
    """Run one measurement in a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.ffcv_loading",
        "--task",
        task,
        "--name",
        name,
        "--data",
        data,
    ]
    done = subprocess.run(
        [*command, "--directory", str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def run_round(directory: Path, data: str, results: dict[tuple[str, str], list[float]]) -> None:
    """Measure every candidate once."""
    for name in OF_DATA[data]:
        found = in_process("measure", name, data, directory)
        results.setdefault((data, name), []).append(found)
        print(f"{data:6} {name:22} {found:12,.0f} images per CPU-second", flush=True)


def print_ratios(results: dict[tuple[str, str], list[float]]) -> None:
    """Compare the medians with what is wanted."""
    medians = {key: statistics.median(values) for key, values in results.items()}
    for data, name, other, wanted in WANTED:
        if (data, name) in medians:
            ratio = medians[data, name] / medians[data, other]
            verdict = "ok" if ratio >= wanted else "BELOW"
            print(f"{data:6} {name} / {other}: {ratio:.2f}  (wanted {wanted})  {verdict}")


def print_start(directory: Path, rounds: int) -> None:
    """Compare what comes before the first image."""
    taken: dict[str, list[float]] = {"ours": [], "ours again": [], "stock": []}
    for turn in range(rounds):
        cache = str(directory / f"cache{turn}")  # where compiled code is kept
        taken["ours"].append(in_process("first", "ours", "first", directory, XDG_CACHE_HOME=cache))
        again = in_process("first", "ours", "first", directory, XDG_CACHE_HOME=cache)
        taken["ours again"].append(again)
        taken["stock"].append(in_process("first", "stock", "first", directory))
    for name, seconds in taken.items():
        print(f"first batch, {name}: {statistics.median(seconds):.2f} CPU-seconds")
    ratio = statistics.median(taken["ours"]) / statistics.median(taken["stock"])
    print(f"first batch, ours / stock: {ratio:.2f}  (wanted at most 0.45)")
    peaks = [in_process("memory", "ours", data, directory) for data in ("even", "large")]
    print(f"memory with one image of 12 megapixels: {peaks[1] - peaks[0]:+.0f} MiB (at most +500)")
    make_index(directory / "million.beton")
    construction = in_process("construct", "ours", "million", directory)
    print(f"a loader of {MILLION:,} samples: {construction:.2f} CPU-seconds (wanted at most 0.5)")


def main() -> None:
    """Make the data, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", choices=[*OF_DATA, "start"], action="append")
    for hidden in ("task", "name", "data", "directory"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        print(TASKS[given.task](given.name, given.data, Path(given.directory)))
        return
    chosen = given.only or [*OF_DATA, "start"]
    with terminable(), scratch() as directory:
        make_data(directory, given.images)
        results: dict[tuple[str, str], list[float]] = {}
        for _ in range(given.rounds):
            for data in OF_DATA:
                if data in chosen:
                    run_round(directory, data, results)
        print_ratios(results)
        if "start" in chosen:
            print_start(directory, given.rounds)


if __name__ == "__main__":
    main()

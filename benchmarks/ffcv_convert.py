"""Convert a folder of JPEG photos into a .beton file: FFCV's own writer and torchweld-ffcv.

Every measurement is a fresh process, the ways take turns, and images per CPU-second are counted
over the process and its workers, imports not included. FFCV's writer decodes and encodes every
photo again; torchweld-ffcv keeps the bytes of the files. To compare like with like, the second row
encodes again too, and writes what FFCV writes.

    python -m benchmarks.ffcv_convert [--images 2000] [--rounds 3] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.scratch import scratch, terminable

QUALITY = 90
HEIGHT, WIDTH = 400, 500


class Opened:
    """Samples as a Dataset gives them: decoded by PIL."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*/*.jpg"))

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """A photo and its class."""
        file = self.files[index]
        return Image.open(file).convert("RGB"), int(file.parent.name)


def write_photos(folder: Path, count: int) -> int:
    """Crops of two photos, about 400x500, JPEG of quality 90; returns their bytes."""
    sources = load_sample_images().images
    drawn = np.random.default_rng(0)
    size = 0
    for index in range(count):
        height, width = (drawn.integers(95, 106, 2) * (HEIGHT, WIDTH)) // 100
        source = sources[index % 2]
        top = drawn.integers(0, source.shape[0] - height + 1)
        left = drawn.integers(0, source.shape[1] - width + 1)
        path = folder / str(index % 2) / f"{index:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        crop = source[top : top + height, left : left + width]
        Image.fromarray(crop).save(path, quality=QUALITY)
        size += path.stat().st_size
    return size


def stock(folder: Path, target: Path, workers: int) -> Callable[[], object]:
    """FFCV's writer as its documentation shows it."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "image": RGBImageField(write_mode="jpg", jpeg_quality=QUALITY),
        "label": IntField(),
    }
    writer = DatasetWriter(str(target), fields, num_workers=workers)
    return lambda: writer.from_indexed_dataset(Opened(folder))


def encoded(folder: Path, target: Path, workers: int) -> Callable[[], object]:
    """torchweld-ffcv, made to do what FFCV's writer does."""
    from torchweld_ffcv import convert
    from torchweld_ffcv.kinds import Image as Picture
    from torchweld_ffcv.kinds import Int, Kind

    fields: dict[str, Kind] = {"image": Picture(store="jpeg", quality=QUALITY), "label": Int()}
    return lambda: convert(Opened(folder), target, fields=fields, workers=workers)


def kept(folder: Path, target: Path, workers: int) -> Callable[[], object]:
    """torchweld-ffcv with the folder: the bytes of the files are kept."""
    from torchweld_ffcv import convert

    return lambda: convert(folder, target, workers=workers)


WAYS = {"FFCV's writer": stock, "torchweld-ffcv, encoded again": encoded, "torchweld-ffcv": kept}


def cpu_seconds() -> float:
    """Of this process and of all workers that have ended."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure_one(way: str, folder: Path, target: Path, workers: int) -> None:
    """Convert in this process and print what it took, as JSON."""
    run = WAYS[way](folder, target, workers)
    started, used = time.monotonic(), cpu_seconds()
    run()
    for worker in multiprocessing.active_children():
        worker.join()  # FFCV's writer does not; its workers' time counts once they have ended
    numbers = {"wall": time.monotonic() - started, "cpu": cpu_seconds() - used}
    print(json.dumps({**numbers, "bytes": target.stat().st_size}))


def measure(way: str, folder: Path, target: Path, workers: int) -> dict[str, float]:
    """Convert in a fresh process."""
    words = [sys.executable, "-m", "benchmarks.ffcv_convert", "--way", way]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, str(folder), str(target), "--workers", str(workers)],
        cwd=Path(__file__).parents[1],
        env=environ,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def report(found: dict[str, list[dict[str, float]]], count: int) -> None:
    """Print medians and ranges of images per CPU-second."""
    base = statistics.median(count / one["cpu"] for one in found["FFCV's writer"])
    print(f"{'':32}{'images / CPU-s':>18}{'median':>9}{'ratio':>8}{'images / s':>12}{'MB':>8}")
    for way, rounds in found.items():
        rates = [count / one["cpu"] for one in rounds]
        wall = statistics.median(count / one["wall"] for one in rounds)
        middle = statistics.median(rates)
        spread = f"{min(rates):.0f} - {max(rates):.0f}"
        size = rounds[0]["bytes"] / 1e6
        print(f"{way:32}{spread:>18}{middle:9.0f}{middle / base:8.2f}{wall:12.0f}{size:8.0f}")


def main() -> None:
    """Measure all ways, taking turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--way", nargs=3, metavar=("WAY", "FOLDER", "TARGET"))
    given = parser.parse_args()
    if given.way:
        measure_one(given.way[0], Path(given.way[1]), Path(given.way[2]), given.workers)
        return
    with terminable(), scratch() as place:
        folder, target = place / "photos", place / "out.beton"
        folder.mkdir()
        size = write_photos(folder, given.images)
        print(
            f"{given.images} photos of {size / given.images / 1000:.0f} kB, {given.workers} workers"
        )
        print(f"python {platform.python_version()}, ffcv {version('ffcv')}, {os.cpu_count()} cores")
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way, rounds in found.items():
                rounds.append(measure(way, folder, target, given.workers))
                target.unlink()
        report(found, given.images)


if __name__ == "__main__":
    main()

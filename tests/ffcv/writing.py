"""Small datasets to convert, and what a conversion may leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from torchweld_ffcv.beton import Beton, read_beton
from torchweld_ffcv.install import ffcv_module

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
"""A folder without images."""


def picture(seed: int, height: int = 12, width: int = 16) -> np.ndarray[Any, Any]:
    """Random pixels of shape (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pairs(count: int) -> list[tuple[np.ndarray[Any, Any], int]]:
    """``(picture, label)`` samples; the label is the index."""
    return [(picture(index), index) for index in range(count)]


def photo_folder(directory: Path, count: int, suffix: str = ".jpg") -> Path:
    """``count`` photos in two class folders."""
    for index in range(count):
        folder = directory / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(picture(index, 6, 8)).resize((80, 60))
        smooth.save(folder / f"{index:03d}{suffix}")
    return directory


def read_stock(path: Path, *, os_cache: bool = True, fields: Sequence[str] = ()) -> list[Any]:
    """All samples of a file as stock FFCV's own loader gives them, in order; not compiled."""
    import torch  # here, so that programs which only convert start quickly

    loader_module = ffcv_module("ffcv.loader")
    compiler = ffcv_module("ffcv.pipeline.compiler").Compiler
    threads, enabled = torch.get_num_threads(), compiler.is_enabled
    compiler.set_enabled(False)
    try:
        loader = loader_module.Loader(
            str(path), batch_size=1, num_workers=1, drop_last=False, os_cache=os_cache
        )
        return [tuple(part[0].clone() for part in batch) for batch in loader]
    finally:
        compiler.set_enabled(enabled)
        torch.set_num_threads(threads)


def frames(beton: Beton) -> list[tuple[int, int, int]]:
    """Mode (0 JPEG, 1 pixels), width and height of every picture in the first field."""
    rows: Any = beton.metadata["f0"]
    found: list[tuple[int, int, int]] = rows[["mode", "width", "height"]].tolist()
    return found


def stored(beton: Beton, name: str, index: int) -> bytes:
    """The bytes of one value, found as FFCV finds them: by its pointer in the table."""
    position = [field.name for field in beton.fields].index(name)
    row = beton.metadata[f"f{position}"][index]
    pointer = row if row.dtype.names is None else row[row.dtype.names[-1]]
    if row.dtype.names == ("ptr", "size"):
        pointer = row["ptr"]
    table = beton.allocations()
    found = table[table["ptr"] == pointer][0]
    with beton.path.open("rb") as file:
        file.seek(int(pointer))
        return file.read(int(found["size"]))


def skipped(path: Path) -> list[int]:
    """Indices that the file's manifest lists as left out."""
    manifest = read_beton(path).manifest
    assert manifest is not None
    return [index for index, _ in manifest.data["skipped"]]


def shared_memory_of(process: int) -> list[str]:
    """Named shared memory that a process uses, which would stay if it were killed now."""
    maps = Path(f"/proc/{process}/maps").read_text().splitlines()
    return [line for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")]


def leftovers(directory: Path) -> list[str]:
    """Unfinished files in a directory."""
    return sorted(path.name for path in directory.glob(".*.part"))


def processes_with(word: str) -> list[int]:
    """Processes that have ``word`` on their command line, except this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            found += [int(entry.name)] if word.encode() in words else []
    return found


def wait_until(condition: Any, seconds: float = 120.0) -> None:
    """Look again and again, at most so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


def start_script(text: str, *words: str) -> subprocess.Popen[str]:
    """Start a Python program that can import the tests."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", text, *words],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

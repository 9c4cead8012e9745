"""Files to read and loaders over them, as the tests need them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.ffcv.writing import ROOT, picture
from torchweld.interfaces import Env, LoaderRequest
from torchweld_ffcv import FfcvOptions, convert
from torchweld_ffcv.kinds import Image
from torchweld_ffcv.source import FfcvSource

__all__ = ["ROOT"]

Array = np.ndarray[Any, Any]


def photo(seed: int, height: int = 60, width: int = 80) -> Array:
    """A smooth picture with some noise, as JPEG is made for."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        127 + 90 * np.sin(x / random.uniform(4, 20)) * np.cos(y / random.uniform(4, 20))
        for _ in range(3)
    ]
    noisy = np.stack(waves, axis=-1) + random.normal(0, 4, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def write(path: Path, samples: Sequence[Any], store: str = "raw") -> Path:
    """Convert ``(picture, label)`` samples."""
    fields: Any = None
    if store == "jpeg":
        from torchweld_ffcv.kinds import Int

        fields = {"image": Image(store="jpeg"), "label": Int()}
    convert(samples, path, fields=fields, workers=1)
    return path


def pictures(count: int, height: int = 12, width: int = 16) -> list[tuple[Array, int]]:
    """``(picture, label)`` samples of one size; the label is the index."""
    return [(picture(index, height, width), index) for index in range(count)]


def photos(count: int) -> list[tuple[Array, int]]:
    """``(photo, label)`` samples of several sizes."""
    return [(photo(i, 40 + 5 * (i % 5), 90 - 7 * (i % 4)), i) for i in range(count)]


def source(**options: Any) -> FfcvSource:
    """The data source with these options."""
    chosen = FfcvOptions(**options)
    return FfcvSource(**{f.name: getattr(chosen, f.name) for f in fields(chosen)})


def env(rank: int = 0, world_size: int = 1) -> Env:
    """A process among others that exist by number only."""
    return Env(rank, world_size, rank, torch.device("cpu"))


def load(
    data: Any,
    *,
    train: bool = True,
    seed: int = 5,
    rank: int = 0,
    world_size: int = 1,
    channels_last: bool = False,
    **options: Any,
) -> Any:
    """A loader of ``data``."""
    request = LoaderRequest(data, train, env(rank, world_size), seed, channels_last=channels_last)
    return source(**options).build(request)


def labels(batches: Iterable[Any]) -> list[int]:
    """The labels of all batches, in order."""
    return [int(label) for batch in batches for label in batch[1]]


def digest(batches: Iterable[Any]) -> list[str]:
    """A hash of every batch."""
    return [
        hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in batch)).hexdigest()
        for batch in batches
    ]

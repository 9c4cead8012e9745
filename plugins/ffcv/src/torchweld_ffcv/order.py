"""The order of ``order="quasi_random"``: random, and yet read from a few places of the file.

For files that are larger than the memory: every page is read once, near the other samples of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from torchweld_ffcv import layout
from torchweld_ffcv.beton import Beton


class QuasiRandom:
    """``(seed, epoch) -> indices``: pages in random order, samples of some pages mixed.

    Args:
        beton: the file; it has a field with a pointer.
        window: how many pages are mixed with each other.
    """

    def __init__(self, beton: Beton, window: int) -> None:
        self._pages = _page_of_samples(beton)
        self._window = window

    def __call__(self, seed: int, epoch: int) -> list[int]:
        """A permutation that depends on ``seed`` and ``epoch`` only."""
        random = np.random.default_rng([seed, epoch])
        places = random.permutation(int(self._pages.max()) + 1)  # of every page
        groups = places[self._pages] // self._window
        order = np.lexsort((random.random(len(groups)), groups))
        return [int(index) for index in order]


def _page_of_samples(beton: Beton) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Number of the page that holds a sample's first region, counted from 0."""
    for column, field in zip(beton.metadata_dtype.names or (), beton.fields, strict=True):
        if field.type_id in layout.POINTER:
            pointer = layout.POINTER[field.type_id]
            rows = beton.metadata[column]
            starts = rows[pointer] if pointer else rows
            pages = np.unique(starts // beton.page_bytes, return_inverse=True)[1]
            numbers: np.ndarray[Any, np.dtype[np.int64]] = pages.astype(np.int64).reshape(-1)
            return numbers
    return np.zeros(beton.num_samples, np.int64)

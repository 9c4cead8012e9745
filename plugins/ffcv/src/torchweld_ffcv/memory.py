"""Memory of batches that nobody holds any more, for the next ones.

New memory costs a page fault for every 4 KiB that is first written: a tenth of the time of a batch
of decoded images. A batch is the user's as long as any tensor of it lives, and only then its
memory is taken again; so batches can be kept, and a training loop that drops them reads into warm
memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Recycler:
    """Gives arrays out, and takes their memory back when the last reference to them is gone.

    Args:
        most: arrays that are kept for later; what comes back beyond that is given to the system.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: list[Array] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array of undefined content; it aliases nothing that anybody else holds."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = self._find(num_bytes)
        array = memory[:num_bytes].view(dtype).reshape(shape)
        # A tensor made of it, and every view of that tensor, keeps this very object alive.
        back = weakref.finalize(array, self._take_back, memory)
        back.atexit = False
        return array

    def _find(self, num_bytes: int) -> Array:
        while self._free:
            try:
                memory = self._free.pop()
            except IndexError:  # another thread was faster
                break
            if len(memory) >= num_bytes:
                return memory
        return np.empty(num_bytes, np.uint8)

    def _take_back(self, memory: Array) -> None:
        if len(self._free) < self._most:
            self._free.append(memory)

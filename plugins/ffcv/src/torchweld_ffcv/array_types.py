"""Numba's types of arrays, kept as they are beside FFCV's own loader.

numba has one object for each type. ``OSCacheManager.compile_reader`` of ffcv 1.0.2 marks that of
one-dimensional arrays of bytes as read-only, for the whole process: code that is compiled later
cannot write bytes, and what was compiled for such arrays before is not found any more.

Where such a loader ran before this module was imported, numba makes a new object here, and the old
one stays read-only. Images are read all the same. What the program itself compiles stays as FFCV's
loader left it: it cannot write to ``np.empty(n, np.uint8)`` if numba had typed that before, and
code that is compiled for the new object is called in 25 to 50 microseconds instead of 0.1.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numba import types
from numba.core.compiler_lock import global_compiler_lock

_BYTES: Any = types.Array(types.uint8, 1, "C")  # held, as numba forgets a type that nobody holds


def keep_bytes_writable() -> None:
    """Undo what a loader of FFCV's own has done to the type, and have later ones not do it.

    Called when an epoch begins: a program may use FFCV's loader at any time, without this plugin;
    and before anything of FFCV's is compiled here.
    """
    os_cache = sys.modules.get("ffcv.memory_managers.os_cache")
    if os_cache is not None:
        os_cache.OSCacheManager.compile_reader = _compile_reader
        if not _BYTES.mutable:
            with global_compiler_lock:  # nor while another thread compiles
                _BYTES.mutable = True


def _compile_reader(_manager: Any) -> Any:
    """What finds a value's bytes by its address; numba finds the types at the first call."""
    compiler = sys.modules["ffcv.pipeline.compiler"].Compiler

    def read(address: Any, state: Any) -> Any:
        data, starts, sizes = state
        size = sizes[np.searchsorted(starts, address)]
        return data[address : address + size]

    return compiler.compile(read)

"""The C functions of ffcv, taken from its library without importing ffcv.

``import ffcv`` takes 4 s of a core, sets torch's number of threads to 1 and starts numba's threads.
Reading needs none of it: one function of the compiled library is enough.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from importlib.machinery import PathFinder

from torchweld.errors import PluginError
from torchweld_ffcv.install import (
    INSTALL,
    PACKAGES,
    missing_module,
    missing_to_compile,
    package_line,
)


@cache
def libffcv_address(function: str) -> int:
    """Address of a function of libffcv, for compiled code to call.

    Raises:
        PluginError: ffcv, or a library that it is linked to, is missing; says what brings it.
    """
    pointer = ctypes.cast(getattr(_libffcv(), function), ctypes.c_void_p)
    assert pointer.value is not None  # a function that was found has an address
    return pointer.value


def doctor_lines() -> list[str]:
    """What this machine lacks for reading and converting, and what brings it; empty for nothing."""
    try:
        libffcv_address("imdecode")
    except PluginError as error:
        lines = [str(error)]
    else:
        # Converting and pipelines= import ffcv itself, and with it numba.
        lines = [] if importlib.util.find_spec("numba") else [missing_module("numba")]
    systems = [f"{system}: {command}" for system, command in PACKAGES.items()]
    return [*lines, *systems] if lines and missing_to_compile() else lines


@cache
def _libffcv() -> ctypes.CDLL:
    package = PathFinder.find_spec("ffcv")
    if package is None or package.submodule_search_locations is None:
        raise PluginError(missing_module("ffcv"))
    library = PathFinder.find_spec("ffcv._libffcv", package.submodule_search_locations)
    if library is None or library.origin is None:
        raise PluginError(f"ffcv is installed without its compiled library: {INSTALL}")
    try:
        return ctypes.CDLL(library.origin)
    except OSError as error:  # the linker's words
        raise PluginError(
            f"ffcv is installed, but a library that it was compiled against is missing or another "
            f"one now ({error}); install it ({package_line()}) and build ffcv again: "
            "pip install --force-reinstall --no-deps --no-cache-dir ffcv==1.0.2"
        ) from error

"""How this plugin compiles: numba functions that release the GIL and are kept on disk.

A second process then starts in tenths of a second instead of seconds. numba does not keep code that
has a C function's address in it, so C functions come as addresses and are called through
:func:`c_function`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

_SOURCES = ("compiled", "randomness", "windows", "resampling", "pixels")


def compiled(function: Function) -> Function:
    """Compile ``function`` at its first call; read from disk where an earlier process wrote it.

    No ``parallel=True``: threads of our own share the work, so numba's threading layer, which dies
    when two threads enter it or a process forks, is never started.
    """
    folder = _folder()
    settings: Any = numba.config
    before = settings.CACHE_DIR
    settings.CACHE_DIR = folder  # read while decorating, and never again for this function
    try:
        options: Any = {"nogil": True, "error_model": "numpy", "cache": bool(folder)}
        return cast("Function", numba.njit(**options)(function))
    finally:
        settings.CACHE_DIR = before


def is_kept(function: str) -> bool:
    """Whether an earlier process has left the compiled code of a function of that name."""
    return bool(_folder()) and any(Path(_folder()).rglob(f"*.{function}-*.nbi"))


def cache_folder() -> Path:
    """Where what is compiled on this machine is kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "torchweld" / "ffcv" / "compiled"


@cache
def _folder() -> str:
    """Where compiled code is kept, or ``""`` where no such folder can be written.

    Named by the content of all sources: numba looks at the file of the outermost function alone,
    and takes the code of an older version of what that calls.
    """
    here = Path(__file__).parent
    content = sha256(b"".join((here / f"{name}.py").read_bytes() for name in _SOURCES))
    folder = cache_folder() / content.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


def c_function(*arguments: Any, returns: Any) -> Callable[..., Any]:
    """Return a function for compiled code: ``call(address, (…arguments))`` calls what is there."""

    @intrinsic
    def call(_context: Any, _address: Any, given: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            address, packed = values
            items = [
                context.cast(builder, builder.extract_value(packed, i), given.types[i], wanted)
                for i, wanted in enumerate(arguments)
            ]
            kinds = [context.get_value_type(kind) for kind in arguments]
            kind = ir.FunctionType(context.get_value_type(returns), kinds)
            return builder.call(builder.inttoptr(address, kind.as_pointer()), items)

        return returns(types.uintp, given), generate

    return cast("Callable[..., Any]", call)


@intrinsic
def _prefetch(_context: Any, array: Any, _place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        byte = ir.IntType(8).as_pointer()
        address = builder.bitcast(builder.gep(data, [values[1]]), byte)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(function, [address, number(0), number(3), number(1)])  # to be read, and soon
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate


prefetch = cast("Callable[..., Any]", _prefetch)
"""``prefetch(array, place)``: begin to load ``array[place]`` from memory into the cache."""

"""The decoder of a part of a JPEG: ``crop.c``, compiled once where it is used.

A machine that has ffcv has compiled it, against the same library. Where there is no compiler or no
header any more, or where the part is not what the whole image has in its place, whole images are
decoded instead: the same pixels, for about a quarter more time.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from torchweld_ffcv.compiled import cache_folder

_SOURCE = Path(__file__).with_name("crop.c")
_POINTER, _UINT32 = ctypes.c_void_p, ctypes.c_uint32
_log = logging.getLogger(__name__)


def part_decoder(source: np.ndarray[Any, Any], height: int, width: int, whole: int) -> int:
    """Address of ``decode_part``, tried out on one image; 0 where whole images are to be decoded.

    Args:
        source: the bytes of a JPEG file.
        height: of the image.
        width: of the image.
        whole: address of libffcv's ``imdecode``, which says what is right.
    """
    library = _library()
    if library is None:
        return 0
    part = ctypes.cast(library.decode_part, _POINTER).value or 0
    if not decodes_alike(part, whole, source, (height, width), _middle(height, width)):
        _log.warning("whole JPEG images are decoded: %s gives other pixels for a part", _SOURCE)
        return 0
    return part


def decodes_alike(
    part: int,
    whole: int,
    source: np.ndarray[Any, Any],
    size: tuple[int, int],
    box: tuple[int, int, int, int],
) -> bool:
    """Whether a part (top, bottom, left, right) has the pixels that the whole image has there."""
    signature: Any = ctypes.CFUNCTYPE(
        ctypes.c_int, _POINTER, ctypes.c_uint64, _UINT32, _UINT32, _POINTER, *[_UINT32] * 4
    )
    other: Any = ctypes.CFUNCTYPE(
        ctypes.c_int, _POINTER, ctypes.c_uint64, _UINT32, _UINT32, _POINTER, *[_UINT32] * 8
    )
    height, width = size
    ours, theirs = (np.zeros((height, width, 3), np.uint8) for _ in range(2))
    given = source.ctypes.data, source.size, height, width
    failed = signature(part)(*given, ours.ctypes.data, *box)
    failed += other(whole)(*given, theirs.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)
    top, bottom, left, right = box
    here = slice(top, bottom), slice(left, right)
    return not failed and bool(np.array_equal(ours[here], theirs[here]))


def _middle(height: int, width: int) -> tuple[int, int, int, int]:
    return height // 3, height - height // 3, width // 3, width - width // 3


@cache
def _library() -> ctypes.CDLL | None:
    """``crop.c``, compiled and loaded; None where that is not possible."""
    try:
        return ctypes.CDLL(str(_compiled_library()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("whole JPEG images are decoded: %s could not be compiled (%s)", _SOURCE, error)
        return None


def _compiled_library() -> Path:
    text = _SOURCE.read_bytes() + platform.machine().encode()
    folder, compiler = cache_folder(), shutil.which("cc")
    library = folder / f"crop-{sha256(text).hexdigest()[:16]}.so"
    if library.exists():
        return library
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}.part")  # other ranks compile, too
    command = [compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(unfinished)]
    subprocess.run([*command, *_flags()], check=True, capture_output=True, timeout=60)
    unfinished.replace(library)
    return library


def _flags() -> Sequence[str]:
    """Where libjpeg is, in the compiler's words."""
    if shutil.which("pkg-config") is not None:
        found = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "libjpeg"],
            check=False,
            capture_output=True,
            text=True,
        )
        if found.returncode == 0:
            return shlex.split(found.stdout)
    return ["-ljpeg"]

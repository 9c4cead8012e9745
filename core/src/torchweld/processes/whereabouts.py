"""Where this process is, or where it failed, told to those who wait for it."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import torchweld

_LIBRARIES = tuple(str(Path(package.__file__ or "").parent) for package in (torch, torchweld))
_NUM_CALLS = 4


def whereabouts(where: Mapping[str, Any]) -> str:
    """Return what the run is doing and the innermost line of the user's own code.

    Args:
        where: ``{"doing": "step 118"}``, as for the first cause of a failure.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    line = _users_line(frame)
    return f"{where.get('doing', 'set-up')}{f', {line}' if line else ''}"


def raised_at(error: BaseException) -> str:
    """Return the innermost calls of the user's own code in ``error``'s traceback, as it has them.

    A layer's error is raised several calls inside torch, which would hide where the user is.
    """
    calls = traceback.extract_tb(error.__traceback__)
    own = [call for call in calls if not call.filename.startswith((*_LIBRARIES, "<"))]
    lines = traceback.format_list((own or calls)[-_NUM_CALLS:])
    return "".join(["\n  raised in, innermost last:\n", *lines]).rstrip()


def _users_line(frame: FrameType | None) -> str:
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((*_LIBRARIES, "<")):
            return f"{Path(path).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""

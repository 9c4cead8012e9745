"""Scripts that run in a process of their own, which has torch imported already."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

import torch

from tests.core.forking import FORKS


def run_script(path: Path, *, seconds: float = 300.0) -> str:
    """Run a script in its folder, whose modules it can import, and return what it printed.

    It is ``__main__`` of a process forked from one that has imported torch and nothing else of
    weight, which saves some seconds of importing for each script.
    """
    process = FORKS.Process(target=_be_script, args=(path,))
    process.start()
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    printed, errors = (file.read_text("utf-8") for file in _outputs(path))
    assert code == 0, f"exit code {code} (None: after {seconds} s)\n{printed}\n{errors}"
    return printed


def _outputs(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".out"), path.with_suffix(".err")


def _be_script(path: Path) -> None:
    for file, stream in zip(_outputs(path), (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path)]
    runpy.run_path(str(path), run_name="__main__")

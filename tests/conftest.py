"""What all tests share."""

from __future__ import annotations

import atexit
import getpass
import os
import signal
import tempfile
from contextlib import ExitStack

import pytest

from benchmarks.scratch import scratch


def pytest_configure() -> None:
    """Set up what all tests need of their surroundings."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell that runs this in background has Ctrl-C ignored, and every child inherits that;
        # tests send it to each other.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_tidy()


def keep_tidy() -> None:
    """Have all that tests and their processes leave in the temporary directory removed.

    Ranks that a test ends do not put away what torch has made for them when it was imported, and
    torchrun leaves its logs. What pytest keeps of failed tests, and what torch compiled, stays.
    """
    home = tempfile.gettempdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", home)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{home}/torchinductor_{getpass.getuser()}")
    surroundings = ExitStack()
    surroundings.enter_context(scratch())
    atexit.register(surroundings.close)  # early, and so after what multiprocessing puts away itself


@pytest.fixture(autouse=True)
def handlers_of_python() -> None:
    """Let every test begin with Python's own handlers: a test that imports composer replaces them.

    The plugin undoes that itself (``torchweld_composer.imports``); tests call composer, too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

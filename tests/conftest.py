"""What all tests share."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """Let Ctrl-C reach the tests and what they start, also where a shell runs them in background.

    Such a shell has it ignored, and every child inherits that; tests send it to each other.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def handlers_of_python() -> None:
    """Let every test begin with Python's own handlers: a test that imports composer replaces them.

    The plugin undoes that itself (``torchweld_composer.imports``); tests call composer, too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""The one place that imports composer, and undoes what the import does to the process.

Measured for mosaicml 0.32.1: the import replaces the SIGINT and SIGTERM handlers (Ctrl-C becomes
``SystemExit(130)``), draws from Python's ``random``, sets the logger ``torchmetrics`` to INFO with
a handler of its own and adds warning filters. It takes 3 to 6 seconds and 200 MB, so it happens
when a component of this plugin is built, not before.
"""

from __future__ import annotations

import importlib
import logging
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

from torchweld.errors import PluginError

_HANDLED = (signal.SIGINT, signal.SIGTERM)
_INSTALL = "pip install 'torchweld-composer[mosaicml]'"


def composer_module(name: str) -> ModuleType:
    """Import and return a module of composer: ``composer_module("composer.core")``.

    Raises:
        PluginError: composer, or what it imports, is missing or broken.
    """
    if name in sys.modules:
        return sys.modules[name]
    try:
        with side_effects_undone():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PluginError(
            f"this surgery runs Composer's own code, and importing {name} failed: "
            f"no module named {error.name!r}; {_INSTALL}"
        ) from error
    except Exception as error:  # torchvision raises RuntimeError when it does not fit torch
        raise PluginError(
            f"this surgery runs Composer's own code, and importing {name} failed: "
            f"{type(error).__name__}: {error}; mosaicml 0.32.1 needs torch 2.7.0 with "
            f"torchvision 0.22.0: {_INSTALL}"
        ) from error


@contextmanager
def side_effects_undone() -> Iterator[None]:
    """Leave signal handlers, ``random``, warning filters and torchmetrics' logger as they were."""
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    drawn = random.getstate()
    logger = logging.getLogger("torchmetrics")
    logged = (logger.level, list(logger.handlers), logger.propagate)
    try:
        with warnings.catch_warnings():
            # Composer's dependencies warn about each other; nobody who trains can act on it.
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(drawn)
        logger.level, logger.handlers, logger.propagate = logged
        _restore_handlers(handlers)


def _restore_handlers(handlers: Mapping[signal.Signals, object]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread can set handlers, so the import has not either
    for number, handler in handlers.items():
        if handler is not None:  # None: not installed from Python, and then it cannot be set
            signal.signal(number, handler)  # type: ignore[arg-type]  # what getsignal returned

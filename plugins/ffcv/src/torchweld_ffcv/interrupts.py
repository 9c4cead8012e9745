"""Hear a Ctrl-C that comes at a moment when Python cannot raise it.

What a signal handler raises is lost in functions that run around a fork, in weak references'
callbacks, and wherever compiled code asks Python something and clears the error: 1 of 100 Ctrl-C
during conversions went unheard before this was here, and the conversion went on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While the context lasts, SIGINT and SIGTERM are noted and then handled as before.

    Only where Python has a handler for them, and in the main thread, where handlers run.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[int] = []
        self._deferred = False

    def __enter__(self) -> Interrupts:  # noqa: PYI034 - Self is in typing from Python 3.11 on
        """Take over."""
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Give back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise a Ctrl-C that was raised before and got lost.

        Raises:
            KeyboardInterrupt: there was one, and Python's own handler is in charge.
        """
        if signal.SIGINT in self._came:
            self._came.clear()
            if self._handlers[signal.SIGINT] is signal.default_int_handler:
                raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Handle what comes meanwhile at the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            came, self._came = self._came, []
            for number in came:
                self._note(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
        if not self._deferred:
            self._handlers[number](number, frame)

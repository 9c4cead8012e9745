"""Signals that ask a run to end: heard here, obeyed at the next border."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class EndAsked:
    """Whether this process was asked to end, and by which signal.

    Attributes:
        number: of the first signal that came; 0 while none has.
    """

    def __init__(self) -> None:
        self.number = 0

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Remember a signal; repeats change nothing, as SLURM and torchrun both send theirs."""
        self.number = self.number or number


@contextmanager
def heard_signals() -> Iterator[EndAsked]:
    """Hear SIGTERM meanwhile, and SIGUSR1 under SLURM, whose ``--signal`` sends it.

    A handler that the user's script has installed stays in place. Outside of the main thread
    nothing is heard, since Python allows handlers there only.
    """
    asked = EndAsked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = [signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, asked.hear)
    try:
        yield asked
    finally:
        for number in ours:
            if signal.getsignal(number) == asked.hear:
                signal.signal(number, signal.SIG_DFL)


def signal_name(number: int) -> str:
    """``"SIGTERM"``."""
    return signal.Signals(number).name

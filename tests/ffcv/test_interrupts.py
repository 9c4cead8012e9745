from __future__ import annotations

import signal
import threading
from contextlib import suppress

import pytest

from torchweld_ffcv.interrupts import Interrupts


def test_ctrl_c_is_raised_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGINT)


def test_deferred_ctrl_c_is_raised_at_the_end() -> None:
    reached = []

    def interrupted() -> None:
        with Interrupts() as interrupts, interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == ["the end"]


def test_lost_ctrl_c_is_raised_once_when_asked() -> None:
    with Interrupts() as interrupts:
        with suppress(KeyboardInterrupt):  # as a function around a fork does
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()


def test_handler_of_the_user_is_called_once_and_put_back() -> None:
    came: list[int] = []

    def handler(number: int, _frame: object) -> None:
        came.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with Interrupts() as interrupts:
            with interrupts.deferred():
                signal.raise_signal(signal.SIGTERM)
            interrupts.check()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)

    assert came == [signal.SIGTERM]


def test_other_threads_take_over_nothing() -> None:
    handler = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def enter() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()

    assert seen == [handler]

"""A checkpoint that is written beside the training: at most one, and its end is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torchweld.checkpoint import Draft
    from torchweld.processes.beside import BesideExchange

_GRACE_SECONDS = 10.0  # how long a run that has failed waits for the other ranks' part
_START_SECONDS = 1.0  # how long a thread takes to begin, at most


@dataclass(frozen=True)
class _Save:
    """One checkpoint on its way to the disk."""

    draft: Draft
    exchange: BesideExchange
    note: Callable[[Path], None]
    future: Future[Path]

    def work(self) -> None:
        """Write it; what the thread does."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            path = self.draft.finish(self.exchange)
            self.note(path)
        except BaseException as error:  # noqa: BLE001 - raised where the future is asked
            self.future.set_exception(error)
        else:
            self.future.set_result(path)


class BesideSaver:
    """Holds the checkpoint that is being written, if any.

    What goes wrong in the thread is agreed on by the threads of all ranks, so it is the same error
    everywhere, and every rank meets it where all of them wait.
    """

    def __init__(self) -> None:
        self._save: _Save | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint is already known, here, not to have been written."""
        if self._save is None or not self._save.future.done():
            return False
        return self._save.future.exception() is not None

    def start(
        self, draft: Draft, exchange: BesideExchange, note: Callable[[Path], None]
    ) -> Future[Path]:
        """Begin to write ``draft``; the one before must have been waited for.

        A process that comes to its end waits for the thread.

        Args:
            note: called in the thread with the path of the complete checkpoint.
        """
        assert self._save is None, "two checkpoints at once"
        # Held before the thread begins: Ctrl-C in between would leave one that nobody hurries.
        save = self._save = _Save(draft, exchange, note, Future())
        threading.Thread(target=save.work, name="torchweld-save").start()
        return save.future

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any; all ranks come here alike.

        Raises:
            CheckpointError: it was not written; the same on all ranks.
        """
        if self._save is not None:
            wait([self._save.future])  # if Ctrl-C ends this, it is still held
            save, self._save = self._save, None
            save.future.result()

    def wait_after_error(self) -> str:
        """Let the checkpoint come to its end after the run has failed, here or elsewhere.

        The state in it is good whatever happened since. The other ranks are told of the failure
        afterwards: their threads are still at work.

        Returns:
            Why it was not written; empty if it was, or if there was none.
        """
        save, self._save = self._save, None
        if save is None:
            return ""
        save.exchange.hurry(_GRACE_SECONDS)
        try:
            return _outcome(save)
        except KeyboardInterrupt:
            save.exchange.hurry(0)
            return f"{save.draft.path} was still being written when Ctrl-C came again"


def _outcome(save: _Save) -> str:
    if not save.future.running():
        wait([save.future], _START_SECONDS)
    if save.future.cancel():  # the error came before the thread could begin
        save.draft.discard()
        return f"{save.draft.path} was not begun"
    wait([save.future])
    error = save.future.exception()
    return "" if error is None else str(error)

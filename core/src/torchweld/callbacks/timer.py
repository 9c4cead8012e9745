"""A limit of time: the run ends at the border at which it is used up, on all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchweld.interfaces import Border, Progress, Run


class Timer:
    """Ends the run when ``duration`` is used up; ``Trainer(max_time=…)`` makes one.

    Time counts from the first step on, validation included, and goes on where a resumed run
    stopped. The ranks agree on it in the sum that a border makes anyway.

    Args:
        duration: how long to train.
    """

    def __init__(self, duration: timedelta) -> None:
        self.duration = duration
        self._before = 0.0  # seconds of the runs that this one goes on from
        self._goes_on = False
        self._since: float | None = None
        self._agreed = 0.0
        self._agreed_step = 0
        self._seconds_per_step: float | None = None

    def time_elapsed(self) -> float:
        """Seconds used so far, on this rank."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._before + running

    def time_remaining(self) -> float:
        """Seconds that are left, on this rank; below 0 when it took longer."""
        return self.duration.total_seconds() - self.time_elapsed()

    def agree(self, seconds: float, step: int) -> bool:
        """Take the mean of all ranks after ``step``, and return whether the time is used up.

        What is decided here is alike on all ranks, as ``seconds`` is.
        """
        steps = step - self._agreed_step
        if steps > 0:
            self._seconds_per_step = (seconds - self._agreed) / steps
        self._agreed, self._agreed_step = seconds, step
        return seconds >= self.duration.total_seconds()

    def next_due(self, progress: Progress) -> int:
        """The step after which the time will be used up, at the pace of the last ones."""
        if not self._seconds_per_step:
            return progress.step + 1  # one step tells the pace
        left = self.duration.total_seconds() - self._agreed
        return progress.step + max(1, int(left / self._seconds_per_step))

    def at(self, border: Border, run: Run) -> None:
        """Begin to count; the borders themselves ask the rest."""
        if "fit_start" in border.kind:
            # What an earlier fit of this Trainer used is not this one's, unless it goes on from it.
            self._before = self._before if self._goes_on else 0.0
            self._since = time.monotonic()
            self._agreed, self._agreed_step = self._before, border.progress.step
            self._seconds_per_step = None
        if border.kind & {"fit_start", "fit_end"}:
            self._goes_on = False

    def state_dict(self) -> dict[str, Any]:
        """The time used so far."""
        return {"time_elapsed": self.time_elapsed()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a run before."""
        self._before, self._since = float(state["time_elapsed"]), None
        self._goes_on = True

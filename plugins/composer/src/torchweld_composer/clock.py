"""How far the run is, counted in every micro-batch and put right at every border.

Core counts steps too, but tells them at borders only, so that the inner loop stays free; an
algorithm that follows the progress of the run counts in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchweld.interfaces import Border, Run


class Clock:
    """Counts of this run; ``step`` and ``epoch`` are completed ones.

    Attributes:
        accumulate: micro-batches in one optimizer step.
        total_steps: of the whole run, None when nobody knows.
        steps_per_epoch: None when nobody knows.
        samples: over all processes, as of the last border.
    """

    def __init__(self) -> None:
        self.accumulate = 1
        self.total_steps: int | None = None
        self.steps_per_epoch: int | None = None
        self.step = 0
        self.step_in_epoch = 0
        self.epoch = 0
        self.samples = 0
        self._micro_batches = 0

    def bind(self, run: Run) -> None:
        """Take the length of the run, and its position when it continues another one."""
        self.accumulate = run.plan.settings.accumulate_grad_batches
        self.total_steps = run.progress.total_steps
        self.steps_per_epoch = run.progress.steps_per_epoch
        if self.step == 0 and run.progress.step:
            self.step, self.epoch = run.progress.step, run.progress.epoch
            per_epoch = self.steps_per_epoch
            self.step_in_epoch = self.step - self.epoch * per_epoch if per_epoch else 0

    def micro_batch(self) -> bool:
        """Count one micro-batch; True for the first of a step."""
        if self._micro_batches == self.accumulate:  # nobody has said that the step is over
            self.applied()
        self._micro_batches += 1
        return self._micro_batches == 1

    def applied(self) -> None:
        """The optimizer has stepped."""
        self.step += 1
        self.step_in_epoch += 1
        self._micro_batches = 0

    def at_border(self, border: Border) -> bool:
        """Take core's counts; True when an epoch has ended since the last border.

        A border is never inside a step. Without a length in steps the ranks come to the end of an
        epoch at different steps, so only what core tells as such is one.
        """
        progress = border.progress
        self.step_in_epoch += progress.step - self.step
        self.step, self.samples = progress.step, progress.samples
        self._micro_batches = 0
        told = "epoch_end" in border.kind or progress.steps_per_epoch is not None
        ended = told and progress.epoch > self.epoch
        if ended:
            self.epoch, self.step_in_epoch = progress.epoch, 0
        return ended

    @property
    def begins_epoch(self) -> bool:
        """Whether the next step is the first of an epoch."""
        return self.step_in_epoch == 0 and self.step != self.total_steps

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {
            "step": self.step,
            "step_in_epoch": self.step_in_epoch,
            "epoch": self.epoch,
            "samples": self.samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from these counts."""
        self.step, self.step_in_epoch = state["step"], state["step_in_epoch"]
        self.epoch, self.samples = state["epoch"], state["samples"]

"""Writes checkpoints at borders and keeps the ones that are wanted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torchweld.checkpoint import remove
from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from torchweld.interfaces import Border, Progress, Run


class ModelCheckpoint:
    """Saves at the end of epochs, every so many steps, and at the end of the run.

    Args:
        monitor: metric by which checkpoints are compared, e.g. ``"val_loss"``; None keeps the
            newest.
        mode: whether a smaller (``"min"``) or larger value is better.
        save_top_k: how many to keep, >= 1, or -1 for all. With ``monitor`` the newest is kept
            beside them. The default of 2 leaves an intact one should the newest be damaged.
        every_n_train_steps: optimizer steps between two; None for not inside epochs.
        every_n_epochs: epochs between two at their ends; None for not there.

    Attributes:
        last: the newest checkpoint of this run, None before the first.
    """

    def __init__(
        self,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 2,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = 1,
    ) -> None:
        if mode not in {"min", "max"}:
            raise InvalidArgument(f"mode={mode!r}: choose 'min' or 'max'")
        if save_top_k < 1 and save_top_k != -1:
            raise InvalidArgument(f"save_top_k={save_top_k}: keep at least 1, or -1 for all")
        for name, value in (("steps", every_n_train_steps), ("epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise InvalidArgument(f"every {value} {name}: give at least 1, or None for never")
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.last: Path | None = None
        self._saved: list[tuple[float, Path]] = []  # oldest first
        self._saved_step: int | None = None

    def next_due(self, progress: Progress) -> int | None:
        """The next step after which a checkpoint inside an epoch is due."""
        every = self.every_n_train_steps
        return None if every is None else (progress.step // every + 1) * every

    def at(self, border: Border, run: Run) -> None:
        """Save where one is due, once a step; every rank calls it."""
        if "fit_start" in border.kind:
            # The checkpoints of an earlier run of the same Trainer are that run's.
            self.last, self._saved, self._saved_step = None, [], None
        step = border.progress.step
        if step in {0, self._saved_step} or not self._is_due(border):
            return
        if self.monitor is not None and self.monitor not in border.metrics:
            self._refuse_unknown(border)
            return
        self.last, self._saved_step = run.save(), step
        score = border.metrics[self.monitor] if self.monitor is not None else -float(step)
        if self.monitor is not None and self.mode == "max":
            score = -score
        self._saved.append((math.inf if math.isnan(score) else score, self.last))
        if run.env.rank == 0:
            self._prune()

    def _is_due(self, border: Border) -> bool:
        progress = border.progress
        if "fit_end" in border.kind:
            return True
        if "epoch_end" in border.kind and self.every_n_epochs is not None:
            return progress.epoch % self.every_n_epochs == 0
        every = self.every_n_train_steps
        return every is not None and progress.step % every == 0

    def _refuse_unknown(self, border: Border) -> None:
        if "eval_end" in border.kind or "fit_end" in border.kind:
            raise InvalidArgument(
                f"ModelCheckpoint(monitor={self.monitor!r}): the run has no such metric; it has "
                f"{', '.join(sorted(border.metrics))}"
            )

    def _prune(self) -> None:
        if self.save_top_k == -1:
            return
        kept = sorted(self._saved, key=lambda entry: entry[0])[: self.save_top_k]
        newest = self._saved[-1]
        for entry in list(self._saved):
            if entry not in kept and entry is not newest:
                remove(entry[1])
                self._saved.remove(entry)

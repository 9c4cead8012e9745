"""Writes checkpoints at borders and keeps the ones that are wanted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torchweld.callbacks.monitored import check_mode
from torchweld.checkpoint import remove
from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from concurrent.futures import Future

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
        async_save: copy this rank's part of the state to the CPU at the border, and write it in a
            thread beside the next steps. Costs memory for the copy. At most one is in flight: the
            next one waits for it, and so does the end of the run. One that cannot be written ends
            the run on all ranks at the next border, and the older ones stay.

    Attributes:
        last: the newest complete checkpoint of this run, None before the first.
        siblings: the others of this run; a checkpoint that one of them keeps is not removed, and
            one that two want is written once.
    """

    def __init__(
        self,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 2,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = 1,
        async_save: bool = False,
    ) -> None:
        check_mode(mode)
        if save_top_k < 1 and save_top_k != -1:
            raise InvalidArgument(f"save_top_k={save_top_k}: keep at least 1, or -1 for all")
        for name, value in (("steps", every_n_train_steps), ("epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise InvalidArgument(f"every {value} {name}: give at least 1, or None for never")
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.async_save = async_save
        self.last: Path | None = None
        self.siblings: tuple[ModelCheckpoint, ...] = ()
        self._pending: tuple[float, Future[Path]] | None = None
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
            self._pending = None
        self._take_done(run)
        step = border.progress.step
        if step in {0, self._saved_step} or not self._is_due(border):
            return
        if self.monitor is not None and self.monitor not in border.metrics:
            self._refuse_unknown(border)
            return
        self._saved_step = step
        score = self._score(border)
        written = next((s for s in self.siblings if s._saved_step == step), None)
        if written is not None:
            self._share(score, written, run)
        elif self.async_save and "fit_end" not in border.kind:
            future = run.async_save()
            self._take_done(run)  # the one before: it was waited for
            self._pending = score, future
        else:
            self._keep(score, run.save(), run)

    def _share(self, score: float, other: ModelCheckpoint, run: Run) -> None:
        """Keep what another one has saved at this very step."""
        if other._pending is not None:
            self._pending = score, other._pending[1]
        else:
            assert other.last is not None
            self._keep(score, other.last, run)

    @property
    def best(self) -> Path | None:
        """The best complete checkpoint of this run by ``monitor``; without it the newest."""
        best = min(self._saved, key=lambda entry: entry[0], default=None)
        return None if best is None else best[1]

    @property
    def best_score(self) -> float | None:
        """The value of ``monitor`` in :attr:`best`; None without either."""
        if self.monitor is None or not self._saved:
            return None
        score = min(entry[0] for entry in self._saved)
        return -score if self.mode == "max" else score

    def _take_done(self, run: Run) -> None:
        """Count the one in flight once it is complete; that it failed is the run's to say."""
        if self._pending is not None and self._pending[1].done():
            (score, future), self._pending = self._pending, None
            if future.exception() is None:
                self._keep(score, future.result(), run)

    def _keep(self, score: float, path: Path, run: Run) -> None:
        self.last = path
        self._saved.append((score, path))
        self._prune(removes=run.env.rank == 0)

    def _score(self, border: Border) -> float:
        """What checkpoints are compared by; the smallest is the best."""
        if self.monitor is None:
            return -float(border.progress.step)
        score = border.metrics[self.monitor]
        if math.isnan(score):
            return math.inf
        return -score if self.mode == "max" else score

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

    def _prune(self, *, removes: bool) -> None:
        if self.save_top_k == -1:
            return
        kept = sorted(self._saved, key=lambda entry: entry[0])[: self.save_top_k]
        newest = self._saved[-1]
        for entry in list(self._saved):
            if entry not in kept and entry is not newest:
                self._saved.remove(entry)
                if removes and not any(s._keeps(entry[1]) for s in self.siblings):
                    remove(entry[1])

    def _keeps(self, path: Path) -> bool:
        kept = [path for _, path in self._saved]
        if self._pending is not None and self._pending[1].done():
            kept.append(self._pending[1].result())
        return path in kept

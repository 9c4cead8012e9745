"""Writes checkpoints at borders and keeps the ones that are wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from torchweld.callbacks.monitored import check_mode, unknown_metric
from torchweld.checkpoint import is_checkpoint, remove, value_here
from torchweld.errors import InvalidArgument
from torchweld.spelling import named_arguments

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torchweld.interfaces import Border, Progress, Run


class Earlier(NamedTuple):
    """A checkpoint of the run that this one goes on from, and what was measured there."""

    path: Path
    step: int
    metrics: Mapping[str, float]


class _Saved(NamedTuple):
    """A checkpoint and what it is compared by, the smallest the best; None: not measured there."""

    score: float | None
    path: Path


_ELSEWHERE = {
    "dirpath": "Trainer(default_root_dir=…) says where runs are written",
    "filename": "checkpoints are named after their step",
    "save_last": "the newest is always kept",
    "save_weights_only": "trainer.export(path) writes the weights alone",
}
"""Arguments of Lightning's."""


class ModelCheckpoint:
    """Saves at the end of epochs, every so many steps, and at the end of the run.

    Checkpoints are compared only by what was measured at their own step. One between two
    validations is not compared by ``"val_loss"``: it is kept as long as it is the newest. At the
    end of an epoch ``"train_loss"`` is its mean over the epoch, elsewhere since the last log.

    Args:
        monitor: metric by which checkpoints are compared, e.g. ``"val_loss"``; None keeps the
            newest. With one of validation it also saves after each validation inside an epoch,
            unless ``every_n_train_steps`` says when.
        mode: whether a smaller (``"min"``) or larger value is better.
        save_top_k: how many to keep, >= 1, or -1 for all. With ``monitor`` the newest is kept
            beside them. The default of 2 leaves an intact one should the newest be damaged. A run
            with ``ckpt_path="last"`` goes on with those of the run before: they count, and are
            removed when better or newer ones come. One resumed from a path leaves them alone.
        every_n_train_steps: optimizer steps between two; None for not inside epochs.
        every_n_epochs: epochs between two at their ends; None for not there.
        async_save: copy this rank's part of the state to the CPU at the border, and write it in a
            thread beside the next steps. Costs memory for the copy. At most one is in flight: the
            next one waits for it, and so does the end of the run. One that cannot be written ends
            the run on all ranks at the next border, and the older ones stay.

    Attributes:
        last: the newest complete checkpoint of this run, None before the first.
        saved_step: the step of the newest one, written or being written.
        siblings: the others of this run; a checkpoint that one of them keeps is not removed, and
            one that two want is written once.
    """

    @named_arguments("ModelCheckpoint", _ELSEWHERE)
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
        self.saved_step: int | None = None
        self.siblings: tuple[ModelCheckpoint, ...] = ()
        self._pending: tuple[float | None, Future[Path]] | None = None
        self._saved: list[_Saved] = []  # oldest first
        self._earlier: list[_Saved] = []

    def next_due(self, progress: Progress) -> int | None:
        """The next step after which a checkpoint inside an epoch is due."""
        every = self.every_n_train_steps
        return None if every is None else (progress.step // every + 1) * every

    def go_on_from(self, earlier: Sequence[Earlier]) -> None:
        """Take over, in the run that begins, what the run before kept; oldest first."""
        self._earlier = [_Saved(self._score(one.step, one.metrics), one.path) for one in earlier]

    def at(self, border: Border, run: Run) -> None:
        """Save where one is due, once a step; every rank calls it."""
        if "fit_start" in border.kind:
            # The checkpoints of an earlier run are that run's, unless this one goes on from it.
            self.last, self.saved_step, self._pending = None, None, None
            self._saved = self._earlier
        if border.kind & {"fit_start", "fit_end"}:
            self._earlier = []
        self._take_done(run)
        step = border.progress.step
        if step == 0 or border.kind & {"fit_start", "eval_start"} or not self._is_due(border):
            return
        measured = {name: border.metrics[name] for name in border.measured}
        score = self._score(step, measured)
        if score is None:
            self._refuse_unknown(border)
        if step != self.saved_step or (score is not None and not self._is_compared(step)):
            self._save(step, score, border, run)

    def _save(self, step: int, score: float | None, border: Border, run: Run) -> None:
        again, self.saved_step = step == self.saved_step, step
        written = next((s for s in self.siblings if s.saved_step == step), None)
        if written is not None and not again:
            self._share(score, written, run)
        elif self.async_save and "fit_end" not in border.kind:
            future = run.async_save()
            self._take_done(run)  # the one before: it was waited for
            self._pending = score, future
        else:
            self._keep(score, run.save(), run)

    def _share(self, score: float | None, other: ModelCheckpoint, run: Run) -> None:
        """Keep what another one has saved at this very step."""
        if other._pending is not None:
            self._pending = score, other._pending[1]
        else:
            assert other.last is not None
            self._keep(score, other.last, run)

    @property
    def kept(self) -> list[Path]:
        """The complete checkpoints that it keeps, oldest first."""
        paths = [saved.path for saved in self._saved]
        if self._pending is not None and self._pending[1].done():
            future = self._pending[1]
            paths += [] if future.exception() else [future.result()]
        return paths

    @property
    def best(self) -> Path | None:
        """The best complete checkpoint by ``monitor``; without it the newest.

        None where none was saved at a step at which ``monitor`` was measured.
        """
        return self._ranked()[0].path if self._ranked() else None

    @property
    def best_score(self) -> float | None:
        """The value of ``monitor`` in :attr:`best`; None without either."""
        if self.monitor is None or not self._ranked():
            return None
        score = self._ranked()[0].score
        assert score is not None
        return -score if self.mode == "max" else score

    def _ranked(self) -> list[_Saved]:
        """Those that can be compared, the best first; of equal ones the oldest."""
        return sorted((s for s in self._saved if s.score is not None), key=lambda s: s.score or 0.0)

    def _is_compared(self, step: int) -> bool:
        """Whether the newest one, of ``step``, has what it is compared by."""
        if self._pending is not None:
            return self._pending[0] is not None
        return bool(self._saved) and self._saved[-1].score is not None

    def _take_done(self, run: Run) -> None:
        """Count the one in flight once it is complete; that it failed is the run's to say."""
        if self._pending is not None and self._pending[1].done():
            (score, future), self._pending = self._pending, None
            if future.exception() is None:
                self._keep(score, future.result(), run)

    def _keep(self, score: float | None, path: Path, run: Run) -> None:
        self.last = path
        self._saved = [saved for saved in self._saved if saved.path != path]
        self._saved.append(_Saved(score, path))
        self._prune(removes=run.env.rank == 0)

    def _score(self, step: int, measured: Mapping[str, float]) -> float | None:
        """What checkpoints are compared by; the smallest is the best."""
        if self.monitor is None:
            return -float(step)
        score = value_here(self.monitor, measured)
        if score is None or math.isnan(score):
            return None
        return -float(score) if self.mode == "max" else float(score)

    def _is_due(self, border: Border) -> bool:
        if "fit_end" in border.kind:
            return True
        step, epoch = border.progress.step, border.progress.epoch
        every, epochs = self.every_n_train_steps, self.every_n_epochs
        if every is not None and step % every == 0:
            return True
        if epochs is None:
            return False
        if "epoch_end" in border.kind:
            return epoch % epochs == 0
        inside = "eval_end" in border.kind and self._is_of_validation() and every is None
        return inside and (epoch + 1) % epochs == 0

    def _is_of_validation(self) -> bool:
        return self.monitor is not None and self.monitor.startswith("val_")

    def _refuse_unknown(self, border: Border) -> None:
        known = self.monitor in border.metrics
        if not known and border.kind & {"eval_end", "fit_end"}:
            assert self.monitor is not None, "None is known"
            raise unknown_metric(self.monitor, border.metrics, "ModelCheckpoint")

    def _prune(self, *, removes: bool) -> None:
        if self.save_top_k == -1:
            return
        kept = {saved.path for saved in (*self._ranked()[: self.save_top_k], self._saved[-1])}
        for saved in list(self._saved):
            if saved.path not in kept:
                self._saved.remove(saved)
                wanted = any(saved.path in sibling.kept for sibling in self.siblings)
                # An earlier run's may be gone: another run went on from it too.
                if removes and not wanted and is_checkpoint(saved.path):
                    remove(saved.path)

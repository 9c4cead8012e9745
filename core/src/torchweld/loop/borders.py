"""What happens between two segments: the only place where anything is read, logged or called."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchweld.callbacks import ModelCheckpoint, Timer
from torchweld.errors import InvalidArgument, RunError
from torchweld.interfaces import Border
from torchweld.loop.averages import average_of, averaged
from torchweld.loop.beside import BesideSaver
from torchweld.loop.evaluation import evaluate_data
from torchweld.loop.measuring import learning_rates, peak_memory_gib
from torchweld.model.parameters import TrainableWatch
from torchweld.processes.ending import signal_name

if TYPE_CHECKING:
    from torchweld.interfaces import Callback, Loader
    from torchweld.loop.run import TrainingRun


class Borders:
    """Does the work of a border, in one fixed order, on every rank.

    Attributes:
        metrics: the newest value of everything that was measured.
        stop_asked: this rank wants the run to end.
        preempted: a signal asked some rank to end, and there are steps left.
        saver: holds the checkpoint that is being written beside the training.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._wiring = run.wiring
        self.metrics: dict[str, float] = {}
        self._measured: dict[str, float] = {}  # since the last reduction, at its step
        self.stop_asked = self.preempted = False
        self.saver = BesideSaver()
        timers = [c for c in run.wiring.callbacks if isinstance(c, Timer)]
        self._timer = timers[0] if timers else None
        self._marks: set[int | None] = set()
        self._since = time.monotonic()
        self._validated_at: int | None = None
        self._reduced_at = run.position.step
        self._extra = [c for c in run.wiring.callbacks if hasattr(c, "extra_metrics")]
        self._due = [c.next_due for c in run.wiring.callbacks if hasattr(c, "next_due")]
        self._watch = TrainableWatch(run.wiring.prepared.named_parameters())
        self._finished = self._warned = False

    def start(self) -> None:
        """The border before the first step."""
        self._wiring.console.start(self._wiring.table, self._run.progress)
        self._reduced_at = self._run.position.step
        self._call({"fit_start"})
        self._since = time.monotonic()

    def marks(self) -> list[int | None]:
        """The next steps at which callbacks, or the bar, want a border."""
        progress = self._run.progress
        due = [next_due(progress) for next_due in self._due]
        self._marks = {*due, None}
        return [*due, self._wiring.console.next_refresh(progress.step)]

    def work(self, *, weighed: bool) -> None:
        """Do what is due now.

        Args:
            weighed: the segment was the last window of an epoch, whose batches were counted.
        """
        self._fold_losses(weighed=weighed)
        kinds = self._kinds()
        if kinds:
            self._agree(kinds)
        if self._wiring.console.moves:
            self._wiring.console.refresh(self._run.progress, self.metrics)

    def _fold_losses(self, *, weighed: bool) -> None:
        recorder, feed = self._wiring.recorder, self._wiring.feed
        seen = self._run.weigher.seen if weighed else None
        if seen is not None:
            samples = sum(seen)
        elif feed.counts_samples:
            samples = feed.take_count()
        else:
            samples = len(recorder.losses) * (feed.loader.batch_size or 1)
        recorder.close_segment(samples, seen)

    def _kinds(self) -> set[str]:
        """What this border is; none for one that only moves the bar."""
        position, table = self._run.position, self._wiring.table
        in_epoch = position.steps_in_epoch
        kinds = {"epoch_end"} if self._end_epoch() else set()
        if position.step in self._marks or table.log_is_due(position.step) or kinds:
            kinds.add("due")
        if table.exchange_is_due(position.step):
            kinds.add("due")
        epoch_end = "epoch_end" in kinds
        if table.validation_is_due(position.step, position.epoch, in_epoch, epoch_end=epoch_end):
            kinds |= {"due", "eval_end"} if self._wiring.validation.loaders else {"due"}
        return kinds

    def _end_epoch(self) -> bool:
        position, feed = self._run.position, self._wiring.feed
        if feed.num_batches is None:
            # Ranks come to the ends of such epochs at different steps: no border of theirs.
            ended = feed.epoch > position.epoch
            position.epoch = feed.epoch
            return ended and self._wiring.ranks.world_size == 1
        if position.steps_in_epoch < self._wiring.table.steps_per_epoch_known:
            return False
        feed.finish_epoch()  # before anything is saved: it may draw random numbers
        position.epoch += 1
        position.batch = position.steps_in_epoch = 0
        return True

    def _agree(self, kinds: set[str]) -> None:
        self._check_trainable()
        step = self._run.position.step
        self._reduce()
        if "epoch_end" in kinds:
            self._take(self._wiring.recorder.end_epoch())
        if "eval_end" in kinds:
            self._validate()
        if kinds & {"epoch_end", "eval_end"} or self._wiring.table.log_is_due(step):
            self._log(step)
        for schedule in self._wiring.schedules:  # after what is logged, before what is saved
            schedule.at_border(kinds, self.metrics)
        self._call(kinds)
        if kinds & {"epoch_end", "eval_end"}:
            self._agree_to_stop()
        if "epoch_end" in kinds:
            self._wiring.console.end_epoch(self._run.progress, self.metrics, self._saved_note())
        self._since = time.monotonic()

    def _reduce(self) -> None:
        # A rank that knows already that a checkpoint failed must not leave alone: here all hear.
        totals = self._wiring.recorder.reduce(
            stop=self.stop_asked or self.saver.failed,
            end=self._run.end_asked.number > 0,
            grad_norm=self._wiring.prepared.grad_norm(),
            seconds=self._timer.time_elapsed() if self._timer is not None else 0.0,
        )
        if totals.stop:
            self.saver.wait()
        self._reduced_at = self._run.position.step
        self._run.position.samples += totals.samples
        seconds = time.monotonic() - self._since
        found = dict(totals.metrics)
        if totals.samples and seconds > 0:
            found["samples_per_second"] = totals.samples / seconds
        found["epoch"] = float(self._run.position.epoch)
        found["memory_gib"] = peak_memory_gib(self._run.env.device)
        found.update(learning_rates(self._wiring.optimizers))
        for callback in self._extra:
            found.update(callback.extra_metrics(self._run))
        self.metrics.update(found)
        self._measured = found
        self._run.stopping |= totals.stop or totals.end
        if self._timer is not None and self._timer.agree(totals.seconds, self._reduced_at):
            self._end_of_time(self._timer)
        self.preempted |= totals.end and not self._is_complete()
        is_finite = math.isfinite(self.metrics.get("train_loss", 0.0))
        if not is_finite and not self._warned:
            self._warned = True
            self._wiring.console.warn(
                f"the loss is {self.metrics['train_loss']} in or before step "
                f"{self._run.position.step}: lower the learning rate or clip gradients "
                "(gradient_clip_val=1.0)"
            )

    def _take(self, found: Mapping[str, float]) -> None:
        self.metrics.update(found)
        self._measured.update(found)

    def measured(self) -> dict[str, float]:
        """What was measured at this very step: the rest of ``metrics`` is of earlier weights."""
        return dict(self._measured) if self._reduced_at == self._run.position.step else {}

    def _end_of_time(self, timer: Timer) -> None:
        if not self._run.stopping and not self._is_complete():
            self._wiring.console.say(
                f"max_time={timer.duration} is used up after step {self._run.position.step}: the "
                "run ends here; go on with a longer one and ckpt_path='last'"
            )
        self._run.stopping = True

    def _agree_to_stop(self) -> None:
        """A callback may have asked just now; the end of an epoch is worth one more question."""
        if self._wiring.ranks.world_size == 1:
            self._run.stopping |= self.stop_asked
            return
        flag = torch.tensor(float(self.stop_asked), device=self._run.env.device)
        self._run.stopping |= bool(self._wiring.ranks.sum(flag) > 0)

    def _check_trainable(self) -> None:
        thawed, frozen = self._watch.changes()
        for names, token, verb in (
            (thawed, "params.may_unfreeze", "became trainable"),
            (frozen, "params.may_freeze", "was frozen"),
        ):
            if names and token not in self._wiring.provides:
                raise RunError(
                    f"{names[0]!r} {verb} during the run, and this strategy does not provide "
                    f"{token!r}: processes would drift apart without a word; do it before training"
                )

    # ---- validation ------------------------------------------------------------------------

    def evaluate(self, data: Any = None) -> Mapping[str, float]:
        """Evaluate on ``data``, one set or several (plain names), or on ``val=`` (as logged)."""
        if data is None:
            if not self._wiring.validation.loaders:
                raise InvalidArgument("run.evaluate() needs data: give val= to fit or prepare")
            return self._validation_metrics()
        return evaluate_data(self._wiring.evaluator, self._wiring.make_loader, data)

    def _validate(self) -> None:
        self._call({"eval_start"})
        doing, self._run.where["doing"] = self._run.where["doing"], "validation"
        self._take(self._validation_metrics())
        self._run.where["doing"] = doing
        self._validated_at = self._run.position.step

    def _validation_metrics(self) -> dict[str, float]:
        """Of the weights that are trained, and of their average where one is kept."""
        found = self._validated()
        if average_of(self._wiring) is not None:
            with averaged(self._wiring):
                found.update({f"{name}/average": v for name, v in self._validated().items()})
        return found

    def _validated(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, loader in self._wiring.validation.loaders.items():
            limit = self._wiring.validation.num_batches(loader)
            result = self._wiring.evaluator.evaluate(loader, limit=limit)
            found.update({f"val_{k}/{name}" if name else f"val_{k}": v for k, v in result.items()})
        return found

    # ---- callbacks, loggers, the end ------------------------------------------------------------

    def _call(self, kinds: set[str], callbacks: Sequence[Callback] | None = None) -> None:
        progress, measured = self._run.progress, frozenset(self._measured)
        border = Border(frozenset(kinds), progress, dict(self.metrics), measured)
        for callback in self._wiring.callbacks if callbacks is None else callbacks:
            callback.at(border, self._run)

    def _log(self, step: int) -> None:
        for logger in self._wiring.loggers:
            logger.log_metrics(self.metrics, step=step)

    def _saved_note(self) -> str:
        saved = [getattr(callback, "last", None) for callback in self._wiring.callbacks]
        step = f"step-{self._run.position.step}"
        return next((f"checkpoint {p.name}" for p in saved if p is not None and p.name == step), "")

    def finish(self) -> None:
        """The border after the last step: validation if it is due, then the callbacks."""
        if self._finished:
            return
        self.saver.wait()
        if self.preempted:
            self._break_off()
            return
        validation, step = self._wiring.validation, self._run.position.step
        # An own loop may be left at any step; all ranks left it at the same.
        left_early = self._reduced_at != step
        if left_early:
            self._reduce()
        unvalidated = bool(validation.loaders) and self._validated_at != step and step > 0
        if unvalidated:
            self._validate()
        if left_early or unvalidated:
            self._log(step)
        self._call({"fit_end"})
        self.saver.wait()
        self._end("success")

    def _break_off(self) -> None:
        """Save what is there, however little time is left, and end."""
        saves = self._wiring.directory is not None
        path = self._run.save() if saves else None
        # Saved is saved, monitored or not.
        others = [c for c in self._wiring.callbacks if not isinstance(c, ModelCheckpoint)]
        self._call({"fit_end"}, others)
        self._end("aborted")
        number = self._run.end_asked.number
        who = signal_name(number) if number else "a signal to another process"
        kept = f"{path} is complete, go on with ckpt_path='last'" if saves else "nothing was saved"
        step = self._run.position.step
        self._wiring.console.warn(f"{who} ended the run after step {step}: {kept}")

    def _is_complete(self) -> bool:
        total = self._wiring.table.total_steps
        return total is not None and self._run.position.step >= total

    def abandon(self, error: BaseException | None) -> None:
        """End after an error: nothing is validated or saved anew, what is open is closed."""
        if not self._finished:
            unsaved = self.saver.wait_after_error()
            if unsaved:
                self._wiring.console.warn(unsaved)
            note = self._run.where.get("note")
            if note is not None and error is not None:
                self._wiring.console.warn(str(note))
            self._end("failed")

    def _end(self, status: str) -> None:
        self._finished = True
        self._wiring.console.clear()
        for logger in self._wiring.loggers:
            if hasattr(logger, "finalize"):
                logger.finalize(status)
        loaders: list[Loader] = [
            self._wiring.feed.loader,
            *self._wiring.validation.loaders.values(),
        ]
        for loader in loaders:
            loader.close()

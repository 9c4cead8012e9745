"""Ends a run whose metric does not improve any more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torchweld.callbacks.monitored import check_mode, measured_anew, value_of
from torchweld.errors import InvalidArgument
from torchweld.spelling import named_arguments

if TYPE_CHECKING:
    from torchweld.interfaces import Border, Run


class EarlyStopping:
    """Stops on all ranks when a metric has not improved for ``patience`` measurements.

    Args:
        monitor: a metric; one of validation (``"val_…"``) counts after each validation, any other
            at the ends of epochs, with its mean over the epoch.
        mode: whether a smaller (``"min"``) or larger value is better.
        patience: measurements in a row without an improvement, >= 1.
        min_delta: an improvement is more than this, >= 0.
        check_finite: stop also when the metric is NaN or infinite.
        stopping_threshold: stop once the metric is as good as this.
        divergence_threshold: stop once it is worse than this.

    Attributes:
        best: the best value so far, None before the first.
        stopped_step: where the run was stopped, None if it was not.
    """

    @named_arguments("EarlyStopping")
    def __init__(
        self,
        monitor: str,
        *,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        check_mode(mode)
        if patience < 1:
            raise InvalidArgument(f"patience={patience}: give at least 1")
        if min_delta < 0:
            raise InvalidArgument(
                f"min_delta={min_delta}: give at least 0; mode says the direction"
            )
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.min_delta, self.check_finite = min_delta, check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.best: float | None = None
        self.stopped_step: int | None = None
        self._bad = 0

    def at(self, border: Border, run: Run) -> None:
        """Look at the metric where it was measured; every rank sees the same value."""
        if "fit_start" in border.kind:
            self.stopped_step = None
            if border.progress.step == 0:  # not one that goes on
                self.best, self._bad = None, 0
        if "fit_end" in border.kind or not measured_anew(self.monitor, border.kind):
            return
        value = value_of(self.monitor, border.metrics, type(self).__name__)
        reason = self._judge(value)
        if reason:
            self.stopped_step = border.progress.step
            run.say(f"stopped early: {self.monitor} {reason}")
            run.stop()

    def _judge(self, value: float) -> str:
        """Count ``value``; returns why to stop, or nothing."""
        if self.check_finite and not math.isfinite(value):
            return f"is {value}"
        if self.stopping_threshold is not None and self._better(value, self.stopping_threshold):
            return f"{value:.6g} has reached {self.stopping_threshold}"
        if self.divergence_threshold is not None and self._better(self.divergence_threshold, value):
            return f"{value:.6g} is worse than {self.divergence_threshold}"
        if self.best is None or self._better(value, self.best, self.min_delta):
            self.best, self._bad = value, 0
            return ""
        self._bad += 1
        if self._bad < self.patience:
            return ""
        return f"did not improve {self._bad} times in a row; the best was {self.best:.6g}"

    def _better(self, value: float, than: float, delta: float = 0.0) -> bool:
        return value < than - delta if self.mode == "min" else value > than + delta

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"best": self.best, "bad": self._bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the counts of a checkpoint."""
        self.best, self._bad = state["best"], state["bad"]

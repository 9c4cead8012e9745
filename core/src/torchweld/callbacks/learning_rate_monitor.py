"""Logs what a schedule may change beside the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchweld.interfaces import Border, Run


class LearningRateMonitor:
    """Logs momentum and weight decay of each parameter group beside its learning rate.

    The learning rates are logged without it: ``lr`` of the first group, ``lr/1`` of the second.

    Args:
        log_momentum: ``momentum``, ``momentum/1``, …; the first beta of Adam and its kind.
        log_weight_decay: ``weight_decay``, ``weight_decay/1``, ….
    """

    def __init__(self, *, log_momentum: bool = True, log_weight_decay: bool = True) -> None:
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay

    def at(self, border: Border, run: Run) -> None:
        """Nothing: what is logged is asked for by ``extra_metrics``."""

    def extra_metrics(self, run: Run) -> dict[str, float]:
        """The values of this moment, for the log; nothing waits for the device."""
        optimizer = run.model.optimizer
        found: dict[str, float] = {}
        for place, group in enumerate(optimizer.param_groups if optimizer is not None else []):
            end = f"/{place}" if place else ""
            momentum = _momentum(group)
            if self.log_momentum and momentum is not None:
                found[f"momentum{end}"] = momentum
            if self.log_weight_decay and "weight_decay" in group:
                found[f"weight_decay{end}"] = float(group["weight_decay"])
        return found


def _momentum(group: dict[str, Any]) -> float | None:
    if "betas" in group:
        return float(group["betas"][0])
    return float(group["momentum"]) if "momentum" in group else None

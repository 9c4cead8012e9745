"""What callbacks and schedules share that follow one metric."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torchweld.errors import InvalidArgument


def measured_anew(monitor: str, kinds: Collection[str]) -> bool:
    """Whether a metric is measured at a border of these kinds.

    Those of validation (``val_…``) after each validation, all others at the ends of epochs.
    """
    return ("eval_end" if monitor.startswith("val_") else "epoch_end") in kinds


def value_of(monitor: str, metrics: Mapping[str, float], who: str) -> float:
    """Return the metric.

    Raises:
        InvalidArgument: the run has no such metric; lists those that it has.
    """
    if monitor not in metrics:
        raise InvalidArgument(
            f"{who}(monitor={monitor!r}): the run has no such metric; it has "
            f"{', '.join(sorted(metrics))}"
        )
    return metrics[monitor]


def check_mode(mode: str) -> None:
    """Refuse a misspelt mode.

    Raises:
        InvalidArgument: says what there is.
    """
    if mode not in {"min", "max"}:
        raise InvalidArgument(f"mode={mode!r}: choose 'min' or 'max'")

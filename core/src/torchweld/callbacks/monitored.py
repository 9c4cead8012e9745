"""What callbacks and schedules share that follow one metric."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torchweld.checkpoint import value_here
from torchweld.errors import InvalidArgument
from torchweld.spelling import did_you_mean, listing


def measured_anew(monitor: str, kinds: Collection[str]) -> bool:
    """Whether a metric is measured at a border of these kinds.

    Those of validation (``val_…``) after each validation, all others at the ends of epochs.
    """
    return ("eval_end" if monitor.startswith("val_") else "epoch_end") in kinds


def check_measured(monitor: str, who: str, *, validates: bool, epochs_end: bool) -> None:
    """Refuse a metric that no border of the run would measure anew.

    Without this the schedule or the callback would do nothing, without a word.

    Args:
        monitor: the metric.
        who: follows it.
        validates: the run has borders with validation.
        epochs_end: the ends of its epochs are borders.

    Raises:
        InvalidArgument: there are none for this metric.
    """
    if monitor.startswith("val_") and not validates:
        raise InvalidArgument(
            f"{who}(monitor={monitor!r}): this run never validates; give val=, and say when with "
            "check_val_every_n_epoch= or val_check_interval="
        )
    if not monitor.startswith("val_") and not epochs_end:
        raise InvalidArgument(
            f"{who}(monitor={monitor!r}): it is measured at the ends of epochs, and nobody knows "
            "where those of data without a length are on several processes; monitor a metric of "
            "validation, with val_check_interval="
        )


def value_of(monitor: str, metrics: Mapping[str, float], who: str) -> float:
    """Return the metric where it was measured anew; its mean over the epoch, where it has one.

    Raises:
        InvalidArgument: the run has no such metric; lists those that it has.
    """
    if monitor not in metrics:
        raise unknown_metric(monitor, metrics, who)
    return float(value_here(monitor, metrics))


def unknown_metric(monitor: str, metrics: Mapping[str, float], who: str) -> InvalidArgument:
    """Return the error for a metric that the run does not have."""
    meant = did_you_mean(monitor, metrics)
    return InvalidArgument(
        f"{who}(monitor={monitor!r}): the run has no such metric; it has {listing(metrics)}"
        + (f"; {meant}" if meant else "")
    )


def check_mode(mode: str) -> None:
    """Refuse a misspelt mode.

    Raises:
        InvalidArgument: says what there is.
    """
    if mode not in {"min", "max"}:
        raise InvalidArgument(f"mode={mode!r}: choose 'min' or 'max'")

"""The Trainer's keyword arguments, checked and gathered into frozen records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

from torchweld.callbacks import ModelCheckpoint, Timer
from torchweld.components import Precision
from torchweld.errors import InvalidArgument
from torchweld.loop.loggers import LOGGERS

_PRECISIONS: dict[str, Precision] = {
    "32": "32",
    "32-true": "32",
    "bf16": "bf16",
    "bf16-mixed": "bf16",
    "bf16-true": "bf16-true",
    "16": "16",
    "16-mixed": "16",
}


def parse_precision(value: str | int) -> Precision:
    """Return the short form of a precision; Lightning's long forms are accepted.

    Raises:
        InvalidArgument: lists what there is.
    """
    if str(value) not in _PRECISIONS:
        raise InvalidArgument(f"precision={value!r}: choose one of {', '.join(_PRECISIONS)}")
    return _PRECISIONS[str(value)]


def parse_seed(value: Any) -> int | None:
    """Return the seed, or None for none.

    Raises:
        InvalidArgument: python, numpy and torch do not all take it.
    """
    if value is None or (_is_count(value) and value >= 0):
        return cast("int | None", value)
    raise InvalidArgument(f"seed={value!r}: give a whole number of at least 0, or None")


def parse_deterministic(value: Any) -> bool | Literal["warn"]:
    """Return True, False or ``"warn"``.

    Raises:
        InvalidArgument: something else.
    """
    if isinstance(value, bool) or value == "warn":
        return cast('bool | Literal["warn"]', value)
    raise InvalidArgument(f"deterministic={value!r}: give True, False or 'warn'")


def positive(name: str, value: Any) -> int:
    """Return a count of at least 1.

    Raises:
        InvalidArgument: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{name}={value!r}: give a whole number of at least 1")
    return value


def clip_value(value: float | None, algorithm: str) -> float | None:
    """Return the limit of gradients, None for off.

    Raises:
        InvalidArgument: no number, a negative one, or an unknown algorithm.
    """
    if algorithm not in {"norm", "value"}:
        raise InvalidArgument(f"gradient_clip_algorithm={algorithm!r}: choose 'norm' or 'value'")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and value >= 0):
        raise InvalidArgument(
            f"gradient_clip_val={value!r}: give a number above 0, or None for off"
        )
    return None if value == 0 else value


def parse_max_time(value: Any) -> timedelta | None:
    """Return a duration: ``"DD:HH:MM:SS"``, a timedelta, or a mapping of its arguments.

    Raises:
        InvalidArgument: something else, or nothing above 0.
    """
    duration = None
    if isinstance(value, str):
        parts = value.split(":")
        if len(parts) == 4 and all(part.strip().isdecimal() for part in parts):
            units = ("days", "hours", "minutes", "seconds")
            duration = timedelta(**{u: int(p) for u, p in zip(units, parts, strict=True)})
    elif isinstance(value, Mapping):
        try:
            duration = timedelta(**value)
        except TypeError:
            duration = None
    elif value is None or isinstance(value, timedelta):
        duration = value
    if (value is not None and not duration) or (duration and duration <= timedelta(0)):
        raise InvalidArgument(
            f"max_time={value!r}: give 'DD:HH:MM:SS', a datetime.timedelta, or a mapping such as "
            "{'hours': 8}"
        )
    return duration


def timed(extras: Extras, max_time: timedelta | None) -> Extras:
    """Return ``extras`` with what ends the run in time."""
    if max_time is None:
        return extras
    return replace(extras, callbacks=(*extras.callbacks, Timer(max_time)))


def parse_devices(value: Any) -> int | None:
    """Return how many processes must have been launched, None for any number.

    Raises:
        InvalidArgument: no number; processes are chosen by torchrun, not by a list.
    """
    if value in (None, "auto", -1, "-1"):  # a list cannot be looked up in a set
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if _is_count(value) and value >= 1:
        return cast("int", value)
    raise InvalidArgument(
        f"devices={value!r}: give the number of processes that torchrun starts, or 'auto'"
    )


def parse_accelerator(value: str) -> Literal["auto", "cpu", "cuda"]:
    """Return ``auto``, ``cpu`` or ``cuda``; ``gpu`` is ``cuda``.

    Raises:
        InvalidArgument: lists what there is.
    """
    if value not in {"auto", "cpu", "cuda", "gpu"}:
        raise InvalidArgument(f"accelerator={value!r}: choose 'auto', 'cpu' or 'cuda'")
    return cast('Literal["auto", "cpu", "cuda"]', "cuda" if value == "gpu" else value)


@dataclass(frozen=True)
class Duration:
    """How long a run is, and what it leaves out.

    Attributes:
        limit_train_batches: batches of an epoch (int) or a fraction of it (float); None for all.
        val_check_interval: optimizer steps (int) or a fraction of an epoch (float) between two
            validations; None for the ends of epochs.
        overfit_batches: these batches of an epoch are kept and read in every epoch.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    val_check_interval: int | float | None = None
    check_val_every_n_epoch: int | None = 1
    overfit_batches: int | float | None = None

    @property
    def train_batches(self) -> int | float | None:
        """The limit of an epoch."""
        return self.limit_train_batches if self.overfit_batches is None else self.overfit_batches

    @property
    def val_batches(self) -> int | float | None:
        """The limit of a validation."""
        return self.limit_val_batches if self.overfit_batches is None else self.overfit_batches

    def __post_init__(self) -> None:
        for name in ("max_epochs", "max_steps", "check_val_every_n_epoch"):
            _at_least_one(name, getattr(self, name))
        counts = ("limit_train_batches", "limit_val_batches", "val_check_interval")
        for name in (*counts, "overfit_batches"):
            _count_or_fraction(name, getattr(self, name))
        limited = self.limit_train_batches is not None or self.limit_val_batches is not None
        if self.overfit_batches is not None and limited:
            raise InvalidArgument(
                f"overfit_batches={self.overfit_batches} limits training and validation itself: "
                "leave limit_train_batches and limit_val_batches out"
            )


@dataclass(frozen=True)
class Extras:
    """What a run does beside training; each can be switched off."""

    log_every_n_steps: int = 50
    progress_bar: bool = True
    checkpointing: bool = True
    model_summary: bool = True
    logger: Any = True
    callbacks: tuple[Any, ...] = ()
    root: Path = Path("runs")
    barebones: bool = False

    @property
    def writes_into_directory(self) -> bool:
        """Whether a logger or a callback needs a directory of the run."""
        loggers = self.logger if isinstance(self.logger, (list, tuple)) else [self.logger]
        named = any(one is True or isinstance(one, str) for one in loggers)
        return named or any(getattr(c, "needs_directory", False) for c in self.callbacks)

    def __post_init__(self) -> None:
        _at_least_one("log_every_n_steps", self.log_every_n_steps)
        _check_loggers(self.logger)
        timers = [c.duration for c in self.callbacks if isinstance(c, Timer)]
        if len(timers) > 1:
            raise InvalidArgument(
                f"a run has one limit of time, and there are {', '.join(map(str, timers))}: leave "
                "max_time=, which makes a Timer, or one of callbacks out"
            )
        for callback in self.callbacks:
            if isinstance(callback, type):
                name = callback.__name__
                raise InvalidArgument(f"callbacks=[{name}] is a class: make one of it, {name}(…)")
            if not hasattr(callback, "at") and not hasattr(callback, "bind"):
                raise InvalidArgument(
                    f"callbacks=[{callback!r}] has no at(border, run): a callback acts at borders, "
                    "not in every step"
                )


def bare(extras: Extras) -> Extras:
    """Return ``extras`` with everything off, for ``barebones=True``.

    Raises:
        InvalidArgument: something was asked for that barebones leaves out.
    """
    if extras.callbacks or not isinstance(extras.logger, bool):
        raise InvalidArgument("barebones=True leaves out callbacks and loggers: remove one of them")
    return Extras(
        progress_bar=False,
        checkpointing=False,
        model_summary=False,
        logger=False,
        root=extras.root,
        barebones=True,
    )


def dry(extras: Extras) -> Extras:
    """Return ``extras`` with everything off that writes files, for ``fast_dev_run``."""
    callbacks = tuple(
        c
        for c in extras.callbacks
        if not isinstance(c, ModelCheckpoint) and not getattr(c, "needs_directory", False)
    )
    return replace(extras, checkpointing=False, logger=False, callbacks=callbacks)


def as_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """One callback, several or None, as a tuple."""
    if callbacks is None:
        return ()
    return tuple(callbacks) if isinstance(callbacks, Sequence) else (callbacks,)


def _check_loggers(logger: Any) -> None:
    for one in logger if isinstance(logger, (list, tuple)) else [logger]:
        known = isinstance(one, bool) or one in LOGGERS if isinstance(one, (bool, str)) else False
        if not known and not hasattr(one, "log_metrics"):
            raise InvalidArgument(
                f"logger={one!r} has no log_metrics(metrics, step): give True, False, "
                f"{', '.join(map(repr, LOGGERS))}, or loggers with Lightning's method names"
            )


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and not (_is_count(value) and value >= 1):
        raise InvalidArgument(f"{name}={value!r}: give a whole number of at least 1, or None")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count_or_fraction(name: str, value: int | float | None) -> None:
    if value is None:
        return
    if isinstance(value, float) and not 0 < value <= 1:
        raise InvalidArgument(f"{name}={value}: as a fraction it is above 0 and at most 1.0")
    if not isinstance(value, float) and not (_is_count(value) and value >= 1):
        raise InvalidArgument(
            f"{name}={value!r}: give a count of at least 1, a fraction such as 0.5, or None"
        )

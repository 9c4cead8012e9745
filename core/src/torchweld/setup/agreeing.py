"""What every process has to be asked alike, so that none waits for another or trains otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torchweld.callbacks import EarlyStopping, ModelCheckpoint, Timer, Unfreeze
from torchweld.identity import identity, qualified_name

if TYPE_CHECKING:
    from torchweld.setup.requests import Config, FitRequest

_TOGETHER = (EarlyStopping, ModelCheckpoint, Timer, Unfreeze)
"""Callbacks that act on all processes at once. Others, and loggers, may be on one alone."""

_FUNCTIONS = ("loss", "step", "eval_step", "param_groups", "init_weights")


def what_is_asked(request: FitRequest, config: Config) -> dict[str, str]:
    """What is asked of one process, as text that is the same where the same is asked.

    Functions are compared only by whether they are there, since nobody can compare what they do;
    data is not compared: processes may read their own.
    """
    extras = config.extras
    given = {name: "given" for name in _FUNCTIONS if getattr(request, name) is not None}
    values = {
        "call": "prepare" if request.own_loop else "fit",
        **asdict(config.duration),
        "log_every_n_steps": extras.log_every_n_steps,
        "enable_checkpointing": extras.checkpointing,
        "barebones": extras.barebones,
        "val": sorted(name or "one set" for name in request.val_sets),
        "metrics": sorted(request.metrics),
        "ckpt_path": None if request.ckpt_path is None else "given",
    }
    callbacks = [identity(one) for one in extras.callbacks if isinstance(one, _TOGETHER)]
    return {
        **{name: identity(value) for name, value in values.items()},
        **given,
        "callbacks": "; ".join(callbacks),
        "optimizer": _maker(request.optimizer),
        "lr_scheduler": _maker(request.lr_scheduler),
    }


def _maker(given: Any) -> str:
    """A factory with what it was given; an optimizer that was made shows its class alone."""
    if isinstance(given, Mapping):
        return identity({name: _maker(one) for name, one in given.items()})
    return identity(given) if given is None or callable(given) else qualified_name(type(given))

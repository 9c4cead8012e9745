"""What every process has to be asked alike, so that none waits for another or trains otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from torchweld.callbacks import EarlyStopping, ModelCheckpoint, Timer, Unfreeze
from torchweld.identity import identity, qualified_name
from torchweld.loop.schedules import LRSchedule

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from torchweld.setup.requests import Config, FitRequest

_DURATION = ("max_epochs", "max_steps", "val_check_interval", "check_val_every_n_epoch")
_FUNCTIONS = ("loss", "step", "eval_step", "param_groups", "init_weights")
_TOGETHER = (EarlyStopping, ModelCheckpoint, Timer, Unfreeze)
_NUMBERS = (bool, int, float, str)


def what_is_asked(request: FitRequest, config: Config) -> dict[str, str]:
    """What is asked of one process, as text that is the same where the same is asked.

    Functions are compared only by whether they are there, since nobody can compare what they do.
    Data is not compared, nor how much of it is read: processes may have their own.
    """
    extras = config.extras
    values = {
        "call": "prepare" if request.own_loop else "fit",
        **{name: getattr(config.duration, name) for name in _DURATION},
        **{name: getattr(request, name) is not None for name in _FUNCTIONS},
        "log_every_n_steps": extras.log_every_n_steps,
        "enable_checkpointing": extras.checkpointing,
        "writes into a directory": extras.checkpointing or extras.writes_into_directory,
        "val": ["one set" if name == "" else str(name) for name in request.val_sets],
        "metrics": sorted(map(str, request.metrics)),
        "lr_scheduler": _schedule(request.lr_scheduler),
        "ckpt_path": request.ckpt_path is not None,
        "callbacks": [_callback(one) for one in extras.callbacks if _acts_on_all(one)],
    }
    return {name: identity(value) for name, value in values.items()}


def hyper_parameters(optimizers: Mapping[str, Optimizer]) -> dict[str, str]:
    """The numbers by which the optimizers step, of each group."""
    return {
        f"{name}, group {i}, {key}": str(value.item() if is_scalar(value) else value)
        for name, optimizer in optimizers.items()
        for i, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if is_scalar(value) or isinstance(value, (*_NUMBERS, tuple))
    }


def is_scalar(value: Any) -> bool:
    """Whether it is a tensor of one number, as learning rates of captured graphs are."""
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _acts_on_all(callback: Any) -> bool:
    """Whether it brings about borders or values, at which all processes meet."""
    meets = ("next_due", "extra_metrics")
    return isinstance(callback, _TOGETHER) or any(hasattr(callback, name) for name in meets)


def _callback(callback: Any) -> str:
    """Its class, and the arguments of those that are known; not what it has seen so far."""
    name = qualified_name(type(callback))
    known = next((kind for kind in _TOGETHER if isinstance(callback, kind)), None)
    if known is None:
        return name
    arguments = [one for one in inspect.signature(known).parameters if hasattr(callback, one)]
    return f"{name}({', '.join(f'{one}={getattr(callback, one)!r}' for one in arguments)})"


def _schedule(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: _schedule(one) for name, one in given.items()}
    if isinstance(given, LRSchedule):
        return [_factory(given.factory), given.interval, given.monitor]
    return None if given is None else _factory(given)


def _factory(function: Callable[..., Any]) -> str:
    if not isinstance(function, partial):
        return qualified_name(function)
    plain = {k: v for k, v in function.keywords.items() if isinstance(v, _NUMBERS)}
    return f"{qualified_name(function.func)}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"

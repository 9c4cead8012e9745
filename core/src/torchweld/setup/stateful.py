"""Callbacks of a run, and what of it has a state that goes into checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchweld.callbacks import ModelCheckpoint
from torchweld.errors import InvalidArgument
from torchweld.model.remaking import numbered

if TYPE_CHECKING:
    from torchweld.interfaces import Prepared
    from torchweld.loop.wiring import Member
    from torchweld.setup.requests import Config


def ordered_callbacks(callbacks: tuple[Any, ...], config: Config) -> tuple[Any, ...]:
    """The callbacks of the run; those that save come last, to save what the others changed.

    Raises:
        InvalidArgument: one saves, and saving is off.
    """
    savers = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
    others = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
    if savers and not config.extras.checkpointing:
        raise InvalidArgument(
            "callbacks has a ModelCheckpoint and enable_checkpointing=False: remove one of them"
        )
    if config.extras.checkpointing and not savers:
        savers = [ModelCheckpoint()]
    for saver in savers:
        saver.siblings = tuple(other for other in savers if other is not saver)
    return (*others, *savers)


def loss_scalers(prepared: Prepared, members: Mapping[str, Member]) -> dict[str, Any]:
    """Those of fp16: without its state a resumed run would look for the scale anew."""
    every = {f"loss scaler of {name}": one.prepared for name, one in members.items()}
    held = {"loss scaler": prepared, **every}
    return {name: one.loss_scaler for name, one in held.items() if one.loss_scaler is not None}


def stateful_callbacks(callbacks: tuple[Any, ...]) -> dict[str, Any]:
    """Callbacks with a state, by their class; numbered where there are several of one."""
    by_name: dict[str, list[Any]] = {}
    for callback in callbacks:
        if hasattr(callback, "state_dict"):
            by_name.setdefault(f"callback {type(callback).__name__}", []).append(callback)
    found: dict[str, Any] = {}
    for name, items in by_name.items():
        found.update(numbered(name, items))
    return found

"""Which events a stranger's algorithm answers, found by asking a copy of it while planning.

Its classes are imported already, since the object is there. An algorithm may begin to answer an
event later in the run, so it is asked at several moments of an imagined one; what is missed even
so is found at the next border of the real run and refused there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from torchweld_composer.clock import Clock
from torchweld_composer.imports import composer_module
from torchweld_composer.state import AlgorithmState

_EPOCHS, _STEPS = 100, 10
_MOMENTS = (0, 1, 2, 10, 250, 500, 501, 750, 990, 999, 1000)
"""Optimizer steps of an imagined run of 100 epochs with 10 steps each."""


def answered_events(algorithm: Any) -> tuple[str, ...]:
    """Names of the events that ``algorithm`` answers at some moment, in Composer's order."""
    asked = _copy(algorithm)
    events = composer_module("composer.core").Event
    return tuple(event.name for event in events if _answers(asked.match, event))


def _copy(algorithm: Any) -> Any:
    try:
        return copy.deepcopy(algorithm)
    except Exception:  # noqa: BLE001 - a stranger's object; asking the original may change it
        return algorithm


def _answers(match: Callable[[Any, Any], bool], event: Any) -> bool:
    for step in _MOMENTS:
        clock = Clock()
        clock.total_steps, clock.steps_per_epoch = _EPOCHS * _STEPS, _STEPS
        clock.step, clock.epoch, clock.step_in_epoch = step, step // _STEPS, step % _STEPS
        try:
            if match(event, AlgorithmState(nn.Identity(), clock)):
                return True
        except Exception:  # noqa: BLE001 - a stranger's code that misses something it may find later
            return True
    return False

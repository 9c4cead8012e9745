"""Composer's algorithms for torchweld: four by name, every other one as an object.

Importing this module imports neither torch nor composer; :mod:`torchweld_composer.imports` is the
one place that imports composer, and only when a component of this plugin has been selected.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torchweld import Component, hookimpl
from torchweld_composer.adopt import adopted_component, is_algorithm
from torchweld_composer.components import BLURPOOL, CHANNELS_LAST, CUTMIX, LABEL_SMOOTHING
from torchweld_composer.options import (
    BlurPoolOptions,
    ChannelsLastOptions,
    CutMixOptions,
    LabelSmoothingOptions,
)
from torchweld_composer.run_checks import find_problems

if TYPE_CHECKING:
    from torchweld.claims import Phase
    from torchweld.interfaces import RunFacts
    from torchweld.plan import Plan
    from torchweld.problems import Problem

__all__ = [
    "BLURPOOL",
    "CHANNELS_LAST",
    "CUTMIX",
    "LABEL_SMOOTHING",
    "BlurPoolOptions",
    "ChannelsLastOptions",
    "CutMixOptions",
    "LabelSmoothingOptions",
]


@hookimpl
def torchweld_surgeries() -> list[Component]:
    """``blurpool``, ``channels_last``, ``cutmix`` and ``label_smoothing``."""
    return [BLURPOOL, CHANNELS_LAST, CUTMIX, LABEL_SMOOTHING]


@hookimpl
def torchweld_adopt(obj: object, phase: Phase) -> Component | None:
    """Any Composer ``Algorithm`` object, of Composer's own or of somebody else."""
    return adopted_component(obj) if phase == "surgery" and is_algorithm(obj) else None


@hookimpl
def torchweld_check_plan(plan: Plan, facts: RunFacts) -> Iterable[Problem]:
    """Numbers of this run that an adopted algorithm cannot work with."""
    return find_problems(plan, facts)

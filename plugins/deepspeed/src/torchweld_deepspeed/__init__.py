"""DeepSpeed for torchweld: strategy ``deepspeed``, ZeRO 1, 2 and 3 over the real engine.

Importing this module imports neither torch nor deepspeed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torchweld import Component, hookimpl
from torchweld_deepspeed.components import DEEPSPEED
from torchweld_deepspeed.options import DeepSpeedOptions
from torchweld_deepspeed.run_checks import find_problems

if TYPE_CHECKING:
    from torchweld.interfaces import RunFacts
    from torchweld.plan import Plan
    from torchweld.problems import Problem

__all__ = ["DEEPSPEED", "DeepSpeedOptions"]


@hookimpl
def torchweld_strategies() -> list[Component]:
    """``deepspeed``."""
    return [DEEPSPEED]


@hookimpl
def torchweld_check_plan(plan: Plan, facts: RunFacts) -> Iterable[Problem]:
    """Batch sizes in the user's own configuration that are not those of this run."""
    return find_problems(plan, facts)

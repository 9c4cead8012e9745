"""Batch sizes in a user's configuration that are not those of this run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchweld.problems import Problem
from torchweld_deepspeed.merging import find_batch_faults
from torchweld_deepspeed.options import DeepSpeedOptions

if TYPE_CHECKING:
    from torchweld.interfaces import RunFacts
    from torchweld.plan import Plan


def find_problems(plan: Plan, facts: RunFacts) -> list[Problem]:
    """The problems that only the numbers of this run can show."""
    chosen = plan.strategy
    if chosen is None or not isinstance(chosen.options, DeepSpeedOptions):
        return []
    return [
        Problem(
            "TW601",
            "error",
            fault,
            "DeepSpeed compares these numbers with each other only, never with a batch",
            'give both places one number, or write "auto" in the configuration',
            (chosen.name,),
        )
        for fault in find_batch_faults(chosen.options, plan.settings, facts)
    ]

"""Surgery without a run: the model that exported weights fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torchweld.components import Choice
from torchweld.interfaces import Parts
from torchweld.model.remaking import operate_all
from torchweld.planning import make_plan
from torchweld.registry import Registry


def apply_surgery(
    model: nn.Module,
    surgery: Choice | Sequence[Choice],
    *,
    allow: Sequence[str] = (),
    registry: Registry | None = None,
) -> nn.Module:
    """Return ``model`` after surgeries, as a run with them would make it.

    For loading exported weights: ``load_file`` fits the model that the same surgeries made.

    Raises:
        PlanError: the choices cannot be made together.
        SurgeryError: one changes what it does not claim, and ``allow`` does not name it.
    """
    plan = make_plan(
        registry if registry is not None else Registry.installed(),
        strategy="single",
        data="torch",
        surgery=surgery,
        facts={"world>1": False, **_ANY_TRAINING},  # nothing is trained, so any will do
        allow=allow,
    )
    plan.raise_for_problems()
    operations = [(chosen, chosen.make()) for chosen in plan.surgeries]
    loss = torch.nn.functional.cross_entropy
    return operate_all(Parts(model, loss), operations, plan).parts.model


_ANY_TRAINING = {
    "loss.visible": True,
    "loss.accepts_soft_targets": True,
    "loss.smooths": False,
    "inputs.4d": True,
    "targets.ignored": False,
}

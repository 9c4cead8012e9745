"""The first line of a run: all that a bug report needs."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torchweld.interfaces import Env
    from torchweld.plan import Plan


def headline(plan: Plan, env: Env) -> str:
    """Version, plan, processes, device and back end."""
    device = env.device.type
    if env.group is not None:
        device += f", {torch.distributed.get_backend(env.group)}"
    processes = "1 process" if env.world_size == 1 else f"{env.world_size} processes"
    parts = [f"torchweld {version('torchweld')}", f"plan {plan.short}", processes, device]
    return "   ".join([*parts, f"torch {torch.__version__}"])

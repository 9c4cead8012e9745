"""What a border measures without asking the device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch


def learning_rates(optimizers: Mapping[str, Any]) -> dict[str, float]:
    """``lr`` of the first parameter group, ``lr/1`` of the second; of each optimizer by its key."""
    found: dict[str, float] = {}
    for key, optimizer in optimizers.items():
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        found.update({key if i == 0 else f"{key}/{i}": rate for i, rate in enumerate(rates)})
    return found


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB: allocated on the GPU, or resident.

    The allocator's own count: nothing waits for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

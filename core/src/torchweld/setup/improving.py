"""What core does to the model itself, between surgery and the strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torchweld.model.batchnorm import synchronised
from torchweld.model.units import prepare_units
from torchweld.setup.launching import Launched, guarded

if TYPE_CHECKING:
    from torch import nn

    from torchweld.interfaces import Parts
    from torchweld.loop.console import Console


def improved(launched: Launched, parts: Parts, console: Console) -> Parts:
    """Synchronise BatchNorm, checkpoint activations, compile: in this order, as far as asked."""
    settings, env = launched.plan.settings, launched.ranks.env
    model = synchronised(parts.model, env) if settings.sync_batchnorm else parts.model
    units: Sequence[nn.Module] = ()
    if settings.compile or settings.activation_checkpointing:
        units = guarded(
            launched.plan.strategy, "asked for its units", lambda: launched.strategy.units(model)
        )
    trains = parts.optimizer is not None
    for note in prepare_units(model, units, settings, env.device, trains=trains):
        console.say(note)
    return replace(parts, model=model)

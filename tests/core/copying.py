"""A surgery that computes weights from those of the model it is given."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchweld import Claims, Component
from torchweld.interfaces import Parts


class Copying:
    """Puts a copy of the first layer in its place, as a surgery with better layers does."""

    def apply(self, parts: Parts) -> Parts:
        model: Any = parts.model
        layer = nn.Linear(model[0].in_features, model[0].out_features, device="meta")
        layer.weight = nn.Parameter(model[0].weight.detach().clone())
        layer.bias = nn.Parameter(model[0].bias.detach().clone())
        model[0] = layer
        return parts


def copying(provides: str) -> Component:
    """The component; ``provides`` is what it claims, nothing where that is empty."""
    claims = Claims(edits="model.modules", provides=provides or ())
    return Component("copying", "copies", Copying, claims=claims)

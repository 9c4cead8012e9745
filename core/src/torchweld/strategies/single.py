"""Strategy ``single``: one process, nothing in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torchweld.strategies.replicated import estimate_replicated, place, prepare_replicated

if TYPE_CHECKING:
    from torch import nn

    from torchweld.components import Settings
    from torchweld.interfaces import Env, ParameterShape, Prepared, SetupRequest


class SingleStrategy:
    """Trains the model as it is, on one device."""

    backend: Mapping[str, str] = {}

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        """Build it as the user would."""
        return make()

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The whole model."""
        return (model,)

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        """Move the model to its device and make the optimizer."""
        model = place(model, request)
        return prepare_replicated(model, request, wrapped=model, window=None)

    def estimate(
        self,
        shapes: Mapping[str, ParameterShape],
        optimizer_slots: int,
        world_size: int,
        settings: Settings,
    ) -> Mapping[str, int]:
        """The whole model, its gradients and its optimizer state."""
        return estimate_replicated(shapes, optimizer_slots, settings)

    def teardown(self) -> None:
        """Nothing was taken."""

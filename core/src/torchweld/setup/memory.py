"""What a run holds on this rank, beside what its strategy predicted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from torchweld.interfaces import ParameterShape
from torchweld.loop.wiring import needs_closure
from torchweld.model.parameters import owned_parameters
from torchweld.resolving.memory import count_text, size_text
from torchweld.setup.launching import guarded

if TYPE_CHECKING:
    from torch import nn

    from torchweld.components import Chosen, Settings
    from torchweld.interfaces import Border, Prepared, Run, Strategy
    from torchweld.plan import Plan
    from torchweld.processes.ranks import Ranks
    from torchweld.setup.launching import Launched

TOLERANCE = 0.05
"""Part of the predicted bytes by which the found ones may differ without a word."""

Predict = Callable[[int], Mapping[str, int]]
"""Optimizer slots to bytes on a rank."""


def parameter_shapes(model: nn.Module) -> dict[str, ParameterShape]:
    """Every parameter once, also of a model on the meta device."""
    return {
        name: ParameterShape(tuple(p.shape), p.dtype, p.requires_grad)
        for name, _, p in owned_parameters(model)
    }


def estimate(
    chosen: Chosen | None,
    strategy: Strategy,
    shapes: Mapping[str, ParameterShape],
    slots: int,
    world_size: int,
    settings: Settings,
) -> dict[str, int]:
    """Ask a strategy for bytes a rank.

    Raises:
        PluginError: its own code raised.
    """
    work = lambda: dict(strategy.estimate(shapes, slots, world_size, settings))  # noqa: E731
    return guarded(chosen, "asked for its memory", work)


def summary(plan: Plan, model: nn.Module, prepared: Prepared) -> str:
    """One line: how many parameters, and how many bytes of them are on this rank."""
    assert plan.strategy is not None
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    of_them = f" ({count_text(frozen)} frozen)" if frozen else ""
    held = size_text(prepared.bytes_per_rank().get("parameters", 0))
    return f"{plan.strategy.name}: {count_text(total)} parameters{of_them}, {held} on this rank"


class MemoryReport:
    """Says once what is held, at the first border at which optimizer state exists; a callback.

    Args:
        predict: the strategy's estimate for this model and world.
        prepared: the model under it.
        ranks: asked once for what each of them holds.
        say: prints a line.
    """

    def __init__(
        self, predict: Predict, prepared: Prepared, ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        self._predict, self._prepared, self._ranks, self._say = predict, prepared, ranks, say
        self._said = False

    def at(self, border: Border, run: Run) -> None:
        """Compare after the first step; optimizers make their tensors in it."""
        if self._said or border.progress.step == 0:
            return
        self._said = True
        # A rank may hold no parameter at all, so the others say how many slots there are.
        mine = [dict(self._prepared.bytes_per_rank()), slots_of(self._prepared.optimizer)]
        ranks = [json.loads(text) for text in self._ranks.exchange("memory", json.dumps(mine))]
        found, slots = [held for held, _ in ranks], max(slots for _, slots in ranks)
        is_known = slots > 0 or not any(held.get("optimizer") for held in found)
        if all(found):
            self._say(memory_line(found, self._predict(slots) if is_known else {}))


def memory_report(
    launched: Launched,
    shapes: Mapping[str, ParameterShape],
    prepared: Prepared,
    say: Callable[[str], None],
) -> tuple[MemoryReport, ...]:
    """Make the callback; none for an optimizer that keeps more than tensors of parameters.

    Raises:
        PluginError: the strategy cannot estimate.
    """
    if needs_closure(prepared.optimizer):
        return ()
    plan = launched.plan

    def predict(slots: int) -> Mapping[str, int]:
        world_size = launched.ranks.world_size
        return estimate(plan.strategy, launched.strategy, shapes, slots, world_size, plan.settings)

    predict(0)  # a strategy that cannot do it says so now, not in the middle of the run
    return (MemoryReport(predict, prepared, launched.ranks, say),)


def memory_line(ranks: Sequence[Mapping[str, int]], predicted: Mapping[str, int]) -> str:
    """What the rank with most holds and what was predicted; both in detail where they differ.

    Args:
        ranks: bytes found on each.
        predicted: for the rank with most; empty where nothing can be said.
    """
    found = max(ranks, key=_held)
    number = ranks.index(found)
    held = f"memory: {_kinds(found)} on {f'rank {number}' if number else 'this rank'}"
    if not predicted:
        return held
    expected, actual = _held(predicted), _held(found)
    if abs(actual - expected) <= TOLERANCE * expected:
        return f"{held} (predicted {size_text(expected)}, found {size_text(actual)})"
    return (
        f"{held}: {size_text(actual)} found, {size_text(expected)} predicted ({_kinds(predicted)})"
    )


def _kinds(num_bytes: Mapping[str, int]) -> str:
    parameters, state = num_bytes.get("parameters", 0), num_bytes.get("optimizer", 0)
    return f"{size_text(parameters)} parameters + {size_text(state)} optimizer state"


def _held(num_bytes: Mapping[str, int]) -> int:
    """Without gradients, which come and go."""
    return num_bytes.get("parameters", 0) + num_bytes.get("optimizer", 0)


def slots_of(optimizer: Any) -> int:
    """Tensors of a parameter's shape that an optimizer keeps, counted for its largest parameter.

    Args:
        optimizer: or one that wraps the optimizer with the state, as FairScale's OSS and SAM do.

    Returns:
        0 before its first step.
    """
    wrapped = [v for v in getattr(optimizer, "__dict__", {}).values() if isinstance(v, Optimizer)]
    for one in (optimizer, *wrapped):
        state: Mapping[Any, Any] = getattr(one, "state", {})
        kept = {p: s for p, s in state.items() if isinstance(p, Tensor) and s}
        if kept:
            largest = max(kept, key=lambda parameter: parameter.numel())
            values = kept[largest].values()
            return sum(isinstance(v, Tensor) and v.shape == largest.shape for v in values)
    return 0

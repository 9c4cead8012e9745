"""The model of a run: built, given weights, operated on, and compared between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchweld.checkpoint import load_weights
from torchweld.errors import InvalidArgument
from torchweld.interfaces import Parts
from torchweld.model.earlier import EarlierSurgeries
from torchweld.model.names import persistent_buffers
from torchweld.model.parameters import owned_parameters
from torchweld.model.surgery import (
    Operated,
    check_claims,
    difference,
    operate,
    raise_beyond_claims,
    snapshot,
)

if TYPE_CHECKING:
    from torchweld.components import Chosen
    from torchweld.plan import Plan
    from torchweld.problems import Problem
    from torchweld.setup.launching import Launched


def build_model(model: Any, launched: Launched) -> nn.Module:
    """Return the user's module, or build it where the strategy wants it built.

    Raises:
        InvalidArgument: neither a module nor a callable that returns one.
    """
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise InvalidArgument(f"model={model!r}: give an nn.Module, or a function that returns one")

    def make() -> nn.Module:
        built = model()
        if not isinstance(built, nn.Module):
            raise InvalidArgument(
                f"the model function returned {type(built).__name__}, not an nn.Module"
            )
        return built

    return launched.strategy.construct(make, launched.ranks.env, launched.plan.settings)


# ---- surgery -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What all surgeries of a run did.

    Attributes:
        parts: changed.
        reports: one a surgery.
        problems: warnings, and what the user allowed.
        stateful: by component name what it added that has state to be saved.
        done_before: names of surgeries that were left out.
    """

    parts: Parts
    reports: Sequence[Operated]
    problems: Sequence[Problem]
    stateful: Mapping[str, Any]
    done_before: Sequence[str] = ()


def operate_all(
    parts: Parts,
    surgeries: Sequence[tuple[Chosen, Any]],
    plan: Plan,
    earlier: EarlierSurgeries | None = None,
) -> Outcome:
    """Apply every surgery in plan order and check each against its claims.

    Args:
        earlier: what was done to models before, and is left out; takes note of what is done now.

    Raises:
        SurgeryError: a change outside the claims; under ``strict`` also no change. What ``allow``
            names is no error.
    """
    reports: list[Operated] = []
    problems: list[Problem] = []
    stateful: dict[str, Any] = {}
    earlier = EarlierSurgeries() if earlier is None else earlier
    names = [chosen.name for chosen, _ in surgeries]
    done = [name for name in names if earlier.is_done(parts.model, name)]
    for chosen, surgery in surgeries:
        if chosen.name in done:
            continue
        before, old = snapshot(parts), parts
        parts = operate(chosen, surgery, parts)
        found = difference(before, snapshot(parts))
        earlier.note(chosen.name, found.fields, old.model, parts.model)
        problems += check_claims(chosen.name, found, chosen.claims(plan.settings))
        reports.append(Operated(chosen, found))
        stateful.update(_stateful(chosen.name, old, parts))
    settled = plan.settle(problems)
    raise_beyond_claims(settled)
    return Outcome(parts, reports, settled, stateful, done)


def _stateful(name: str, before: Parts, after: Parts) -> dict[str, Any]:
    """What one surgery added that has ``state_dict``, each owner once."""
    owners: dict[int, Any] = {}
    for part in fields(Parts):
        old, new = getattr(before, part.name), getattr(after, part.name)
        if isinstance(new, tuple):
            known = {id(item) for item in old}
            for item in new:
                owner = getattr(item, "__self__", item)
                if id(item) not in known and hasattr(owner, "state_dict"):
                    owners[id(owner)] = owner
    return numbered(name, list(owners.values()))


def numbered(name: str, items: Sequence[Any]) -> dict[str, Any]:
    """``{name: item}`` for one item, ``{name/0: …, name/1: …}`` for several."""
    if len(items) == 1:
        return {name: items[0]}
    return {f"{name}/{i}": item for i, item in enumerate(items)}


def bind_parts(parts: Parts, run: Any) -> Parts:
    """Replace everything that has ``bind`` by what it returns for ``run``."""

    def bound(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(item.bind(run) if hasattr(item, "bind") else item for item in items)

    names = [f.name for f in fields(Parts) if isinstance(getattr(parts, f.name), tuple)]
    bound_parts: dict[str, Any] = {name: bound(getattr(parts, name)) for name in names}
    return replace(parts, **bound_parts)


# ---- weights given by the user -------------------------------------------------------------------


class Weights:
    """The weights of ``init_weights=``: loaded before surgery if they fit then, else after it."""

    def __init__(self, source: str | Path | Mapping[str, Tensor] | None) -> None:
        if source is not None and not isinstance(source, (str, Path, Mapping)):
            raise InvalidArgument(
                f"init_weights={type(source).__name__}: give a .safetensors file, or a mapping of "
                "names to tensors such as a state_dict"
            )
        self._source = source
        self._weights = None if source is None else load_weights(source)

    def load_early(self, model: nn.Module) -> None:
        """Load if the names are those of the user's own model."""
        if self._weights is not None and not _misfit(model, self._weights):
            _load(model, self._weights)
            self._weights = None

    def load_late(self, model: nn.Module) -> None:
        """Load what did not fit before surgery.

        Raises:
            InvalidArgument: it fits neither; names what is missing and what is too much.
        """
        if self._weights is None:
            return
        misfit = _misfit(model, self._weights)
        if misfit:
            where = self._source if isinstance(self._source, (str, Path)) else "the mapping"
            raise InvalidArgument(
                f"init_weights: {where} fits the model neither before nor after surgery: {misfit}"
            )
        _load(model, self._weights)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **{name: parameter for name, _, parameter in owned_parameters(model)},
        **dict(persistent_buffers(model)),
    }


def _misfit(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """What keeps ``weights`` from fitting; empty if nothing. Tied names may be there twice."""
    mine = _named_tensors(model)
    missing = sorted(mine.keys() - weights.keys())
    excess = sorted(weights.keys() - mine.keys() - model.state_dict().keys())
    shapes = [
        f"{name!r} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in mine.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    parts = [f"missing {missing[:3]}"] if missing else []
    parts += [f"not in the model {excess[:3]}"] if excess else []
    return "; ".join([*parts, *shapes[:3]])


@torch.no_grad()
def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    _make_room(model)
    for name, tensor in _named_tensors(model).items():
        if 0 in tensor.stride() and tensor.numel() > 1:
            raise InvalidArgument(
                f"init_weights: {name!r} was cut into pieces while the model was built, so no "
                "weights can be written into it: leave out the option of the strategy that does so"
            )
        tensor.copy_(weights[name])


def _make_room(model: nn.Module) -> None:
    """Replace what is on the meta device by empty tensors on the CPU; tied ones stay tied.

    ``to_empty`` would untie them and wipe what has values already, and ``load_state_dict`` into a
    meta module says "all keys matched" and loads nothing.

    Raises:
        InvalidArgument: a buffer that is in no ``state_dict`` has no value, and none can be given.
    """
    persistent = dict(persistent_buffers(model))
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in persistent:
            raise InvalidArgument(
                f"init_weights: the buffer {name!r} is on the meta device and not in a state_dict, "
                "so no file can fill it: build the model on the CPU"
            )
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None and tensor.is_meta:
                    place[name] = made.setdefault(id(tensor), _empty_like(tensor))  # type: ignore[assignment]  # a parameter for a parameter


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return empty
    return nn.Parameter(empty, requires_grad=tensor.requires_grad)

"""Several models in one run: the children of one module, so that surgery and names see them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from torchweld.errors import InvalidArgument
from torchweld.model.parameters import check_materialised, owned_parameters
from torchweld.model.remaking import Weights, build_model

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from torchweld.interfaces import ParamGroup
    from torchweld.setup.launching import Launched


def build_models(model: Any, launched: Launched) -> nn.Module:
    """Return the user's model, or an ``nn.ModuleDict`` of several.

    Raises:
        InvalidArgument: neither modules nor callables that return one, or two models share a
            parameter, which two optimizers would step.
    """
    if not isinstance(model, Mapping):
        return build_model(model, launched)
    built: dict[str, nn.Module] = {}
    owners: dict[int, tuple[str, str]] = {}
    for name, given in model.items():
        built[name] = one = build_model(given, launched)
        if isinstance(given, nn.Module):
            check_materialised(one)
        for inner, _, parameter in owned_parameters(one):
            other, place = owners.setdefault(id(parameter), (name, inner))
            if other != name:
                raise InvalidArgument(
                    f"the models {other!r} and {name!r} share a parameter ({place!r} and "
                    f"{inner!r}), which two optimizers would step: make them one model"
                )
    return nn.ModuleDict(built)


def children(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The models by name, after surgery.

    Raises:
        InvalidArgument: a surgery made one module of them, or left one out.
    """
    found = dict(model.named_children())
    if not isinstance(model, nn.ModuleDict) or list(found) != list(names):
        raise InvalidArgument(
            f"surgery is done on an nn.ModuleDict of the models {', '.join(names)}, and one made "
            f"a {type(model).__name__} of it: choose surgeries that change layers, or operate on "
            "each model before, with apply_surgery"
        )
    return found


class _WeightsOfSeveral:
    """``init_weights={name: …}``: of any of the models."""

    def __init__(self, sources: Mapping[str, Any]) -> None:
        self._weights = {name: Weights(source) for name, source in sources.items()}

    def load_early(self, models: nn.Module) -> None:
        """Load what fits before surgery."""
        for name, weights in self._weights.items():
            weights.load_early(models.get_submodule(name))

    def load_late(self, models: nn.Module) -> None:
        """Load what did not fit before surgery.

        Raises:
            InvalidArgument: it fits neither.
        """
        for name, weights in self._weights.items():
            weights.load_late(models.get_submodule(name))


def weights_of(source: Any, names: Sequence[str]) -> Weights | _WeightsOfSeveral:
    """The weights of ``init_weights=``; with ``names`` a mapping of them."""
    return _WeightsOfSeveral(source or {}) if names else Weights(source)


def each_its_own(_groups: list[ParamGroup]) -> Optimizer:
    """Stand for the optimizers where surgery sees one: each model has its own."""
    _never()


def _never() -> NoReturn:
    raise AssertionError("of several models each has its own optimizer")

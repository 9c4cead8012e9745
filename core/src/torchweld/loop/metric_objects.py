"""Metrics that are objects with a state, as torchmetrics has them, alone or as collections."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from torchweld.processes.ranks import Ranks


def is_metric_object(metric: Any) -> bool:
    """Whether it is an object with a state, as torchmetrics has them."""
    return all(hasattr(metric, part) for part in ("update", "compute", "reset"))


def as_metrics(metrics: Any) -> Mapping[str, Any]:
    """``metrics=`` as a mapping; a collection given by itself names its values itself."""
    if metrics is None:
        return {}
    return {"": metrics} if is_metric_object(metrics) else metrics


def check_metrics(metrics: Mapping[str, Any], world_size: int) -> None:
    """Refuse metrics that cannot be exact over several ranks.

    Raises:
        InvalidArgument: neither callable nor a metric object, or an object that reduces nothing.
    """
    for name, metric in metrics.items():
        is_object = is_metric_object(metric)
        if not is_object and not callable(metric):
            raise InvalidArgument(
                f"metric {name!r} is a {type(metric).__name__}: give (outputs, targets) -> "
                "(sum, count), or an object with update, compute and reset"
            )
        if is_object and world_size > 1 and not _reduces(metric):
            raise InvalidArgument(
                f"metric {name!r} ({type(metric).__name__}) has no sync(): its value would be each "
                f"process's own over {world_size}; give (outputs, targets) -> (sum, count)"
            )


def value_names(name: str, metric: Any) -> list[str]:
    """Names of the values of a metric, as far as they are known before it is computed."""
    if not is_metric_object(metric) or not hasattr(metric, "keys"):
        return [name]
    return [_joined(name, key) for key in metric.keys()]  # noqa: SIM118  # no mapping


def check_value_names(values: Mapping[str, Iterable[str]]) -> None:
    """Refuse a value that another one, or the loss, would be overwritten by.

    Args:
        values: names of the values by the name of their metric.

    Raises:
        InvalidArgument: names the metric and says what to rename.
    """
    owners = {"loss": "the loss"}
    for metric, names in values.items():
        what = f"metric {metric!r}" if metric else "a collection"
        for name in names:
            if name in owners:
                raise InvalidArgument(
                    f"metrics: {what} has a value {name!r}, and {owners[name]} is measured under "
                    "this name already, so that one would overwrite the other: rename it in "
                    "metrics={…}, in a collection with MetricCollection({'other name': …}) or its "
                    "prefix="
                )
            owners[name] = what


def _joined(name: str, key: object) -> str:
    return f"{name}_{key}" if name else f"{key}"


def _reduces(metric: Any) -> bool:
    """Whether a metric object, or each in a collection, adds up over the ranks by itself."""
    if hasattr(metric, "sync"):
        return True
    members = list(metric.values()) if hasattr(metric, "values") else []
    return bool(members) and all(hasattr(member, "sync") for member in members)


# ---- their values ------------------------------------------------------------------------------


def computed(metrics: Mapping[str, Any], ranks: Ranks) -> dict[str, float]:
    """Compute every metric object, over all ranks; each rank must call it."""
    objects = {name: metric for name, metric in metrics.items() if hasattr(metric, "compute")}
    found: dict[str, float] = {}
    if objects and ranks.world_size > 1:
        _fill_empty_states(list(objects.values()), ranks)
    with warnings.catch_warnings():
        # This rank may have had no sample; that all had none is an error of the evaluation.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        values = {name: _flat(name, metric.compute()) for name, metric in objects.items()}
    functions = {name: [name] for name in metrics.keys() - objects.keys()}
    check_value_names({**functions, **values})
    for one in values.values():
        found.update(one)
    return found


def _fill_empty_states(metrics: Sequence[Any], ranks: Ranks) -> None:
    """Give a rank without samples empty tensors where the others have kept theirs in lists.

    torchmetrics gathers the tensors in a list: for an empty one it makes no collective call, and
    the others wait for it, or take the next call for it (torchmetrics 1.9).
    """
    owners = [owner for metric in metrics for owner in _with_lists(metric)]
    mine = [_layouts(owner) for owner in owners]
    others = [json.loads(text) for text in ranks.exchange("metric states", json.dumps(mine))]
    for place, owner in enumerate(owners):
        for state, layout in mine[place].items():
            known = [other[place][state] for other in others if other[place].get(state)]
            if layout is None and known:
                dtype, shape = known[0]
                empty = torch.empty((0, *shape), dtype=getattr(torch, dtype), device=owner.device)
                setattr(owner, state, [empty])


def _with_lists(metric: Any) -> Iterator[Any]:
    """A metric and those inside it that have states, in the same order on every rank."""
    if not isinstance(metric, nn.Module):
        return
    modules: list[Any] = list(metric.modules())
    for module in modules:
        if hasattr(module, "compute_groups"):
            list(module.values())  # a collection shares the states of its members only here
    yield from (module for module in modules if hasattr(module, "metric_state"))


def _layouts(owner: Any) -> dict[str, Any]:
    """Dtype and shape of what is in each list of a metric; None for an empty one."""
    lists = {name: value for name, value in owner.metric_state.items() if isinstance(value, list)}
    return {
        name: [str(value[0].dtype).removeprefix("torch."), list(value[0].shape[1:])]
        if value
        else None
        for name, value in lists.items()
    }


def _flat(name: str, value: Any) -> dict[str, float]:
    """What a metric object computed, as single numbers.

    A mapping (of a collection) becomes ``<name>_<key>``, or ``<key>`` where there is no name; a
    vector ``<name>_<index>``.
    """
    if isinstance(value, Mapping):
        flat: dict[str, float] = {}
        for key, one in value.items():
            flat.update(_flat(_joined(name, key), one))
        return flat
    values = torch.as_tensor(value)
    if values.dim() == 0:
        return {name: float(values)}
    numbers = values.flatten().tolist()
    return {_joined(name, place): float(number) for place, number in enumerate(numbers)}

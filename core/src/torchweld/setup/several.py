"""Set several models up, each under the same strategy with its own optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.torch_version import TorchVersion

from torchweld.errors import InvalidArgument
from torchweld.loop.joint import Handles, Schedulers, join
from torchweld.loop.wiring import Member, needs_closure
from torchweld.model.parameters import as_factory
from torchweld.model.several import children, each_its_own
from torchweld.setup.setting_up import Bound, Ready, Remade, bind_one
from torchweld.spelling import listing

if TYPE_CHECKING:
    from torch import nn

    from torchweld.interfaces import Parts
    from torchweld.loop.console import Console
    from torchweld.loop.timetable import Timetable
    from torchweld.setup.requests import Config, FitRequest


def bind_several(
    remade: Remade, request: FitRequest, table: Timetable, config: Config, console: Console
) -> Bound:
    """Set every model of ``request`` up; together they look like one.

    Raises:
        InvalidArgument: surgery changed what belongs to one optimizer, one needs a closure, or they
            are to be compiled and this torch cannot.
    """
    _check_parts(remade.parts)
    _check_compiled(remade, request)
    models = children(remade.parts.model, request.names)
    bound = {
        name: bind_one(
            *_of_one(name, model, remade, request), table, config, console, label=f"{name}: "
        )
        for name, model in models.items()
    }
    _check_closures(bound)
    members: dict[str, Member] = {}
    for name, one in bound.items():
        handle: Any = one.handle
        schedule = one.schedule if request.own_loop else None
        members[name] = Member(models[name], one.ready.prepared, handle, schedule)
        handle.others = [other.handle for other in bound.values() if other is not one]
    prepared = join(members)
    ready = {name: one.ready for name, one in bound.items()}
    schedules = [one.schedule for one in bound.values()]
    schedulers = {n: one.scheduler for n, one in bound.items() if one.scheduler is not None}
    return Bound(
        ready=Ready(
            prepared,
            ", ".join(f"{n}: {one.optimizer_class}" for n, one in ready.items()),
            [[f"{n}.{p}" for p in names] for n, one in ready.items() for names in one.group_names],
            next(iter(ready.values())).provides,
        ),
        handle=Handles(prepared, members),
        scheduler=Schedulers(schedulers) if schedulers else None,
        reports=tuple(report for one in bound.values() for report in one.reports),
        members=members,
        # fit steps the only model that is trained, and its schedule with it.
        schedule=None if request.own_loop else next(filter(None, schedules), None),
    )


def _of_one(
    name: str, model: nn.Module, remade: Remade, request: FitRequest
) -> tuple[Remade, FitRequest]:
    """What there would be if this were the only model."""
    if request.optimizer[name] is None:
        # A loss that goes through it would leave gradients that nobody uses and nobody clears.
        model.requires_grad_(False)
    rule = _of(request.param_groups, name)
    factory = as_factory(request.optimizer[name], model, rule)
    parts = replace(remade.parts, model=model, param_groups=rule, optimizer=factory)
    alike = replace(request, lr_scheduler=_of(request.lr_scheduler, name))
    return replace(remade, parts=parts), alike


def _check_compiled(remade: Remade, request: FitRequest) -> None:
    """Refuse to compile models that are frozen in turn, with a torch that mistakes their graphs.

    With torch 2.7 a model that was frozen when its graph was made, and then was not, has no
    gradients, without a word; with 2.13 it has. What is between was not tried.
    """
    trained = [name for name, optimizer in request.optimizer.items() if optimizer is not None]
    old = TorchVersion(torch.__version__) < "2.13"
    if remade.launched.plan.settings.compile is not None and len(trained) > 1 and old:
        raise InvalidArgument(
            f"compile= was asked for, and {listing(trained)} are trained, each with the others "
            f"frozen: torch {torch.__version__} loses gradients of compiled modules that are "
            "frozen in turn; leave compile out, or use torch 2.13"
        )


def _check_closures(bound: Mapping[str, Bound]) -> None:
    for name, one in bound.items():
        if needs_closure(one.ready.prepared.optimizer):
            raise InvalidArgument(
                f"the optimizer of {name!r}, {type(one.ready.prepared.optimizer).__name__}, "
                "evaluates the loss itself, which a run of several models cannot offer: choose "
                "another optimizer"
            )


def _of(given: Mapping[str, Any] | None, name: str) -> Any:
    return (given or {}).get(name)


def _check_parts(parts: Parts) -> None:
    """Refuse what a surgery made for one model that has one optimizer.

    Raises:
        InvalidArgument: names the part.
    """
    changed = [
        what
        for what, is_changed in (
            ("the optimizer", parts.optimizer is not each_its_own),
            ("param_groups", parts.param_groups is not None),
            ("what comes after a step", bool(parts.after_step)),
        )
        if is_changed
    ]
    if changed:
        raise InvalidArgument(
            f"a surgery changes {' and '.join(changed)}, and of several models each has its own: "
            "leave that surgery out, or make the models one"
        )

"""The beginning of every run: import, launch, agree, make what the plan names."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torchweld.errors import InvalidArgument, PluginError, TorchweldError
from torchweld.model.batchnorm import check_can_synchronise
from torchweld.model.facts import run_facts
from torchweld.model.precision import check_precision
from torchweld.processes.agree import agree_on_plan
from torchweld.processes.ranks import Ranks, launch

if TYPE_CHECKING:
    from torchweld.components import Chosen
    from torchweld.interfaces import DataSource, Strategy
    from torchweld.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Launched:
    """A run whose processes agree on what to do; ``plan`` has the facts of the launch."""

    ranks: Ranks
    plan: Plan
    strategy: Strategy
    data: DataSource
    val_data: DataSource


def start(plan: Plan, devices: int | None) -> Launched:
    """Import what the plan names, find the other processes, agree with them, and build.

    Imports come first: importing a wrapped library may draw from Python's random state, which is
    left as it was.

    Raises:
        PlanError: the plan has errors here or on another rank.
        RanksDisagree: the ranks planned different things.
        PluginError: a selected component cannot be built.
    """
    broken = _import_all(plan) if not plan.has_errors else None
    ranks = launch(plan.settings.accelerator)
    with ranks.first_cause({"doing": "set-up"}):
        if broken is not None:
            raise broken
        return _agreed(plan, ranks, devices)


def _agreed(plan: Plan, ranks: Ranks, devices: int | None) -> Launched:
    _check_devices(devices, ranks)
    plan = plan.with_facts(run_facts(ranks.env))
    agree_on_plan(ranks, plan)
    check_precision(plan.settings.precision, ranks.env.device)
    if plan.settings.sync_batchnorm:
        check_can_synchronise(ranks.env)
    strategy = build(plan.strategy)
    data = build(plan.data)
    val_data = build(plan.val_data) if plan.val_data is not None else data
    # Joining waits for all in a way that cannot be interrupted: nobody may stop just before it.
    ranks.exchange("set-up", "")
    ranks.join(strategy.backend)
    return Launched(ranks, plan, strategy, data, val_data)


def _import_all(plan: Plan) -> TorchweldError | None:
    """Import the components; what goes wrong is returned, to be told to the other ranks."""
    state = random.getstate()
    try:
        for chosen in plan.order:
            guarded(chosen, "imported", chosen.load)
    except TorchweldError as error:
        return error
    finally:
        random.setstate(state)
    return None


def build(chosen: Chosen | None) -> Any:
    """Make a component of the plan.

    Raises:
        InvalidArgument: its options cannot work; core's own words.
        PluginError: the component's code raised.
    """
    assert chosen is not None, "a plan without errors has a strategy and a data source"
    return guarded(chosen, "built", chosen.make)


def guarded(chosen: Chosen | None, doing: str, work: Callable[[], T]) -> T:
    """Return ``work()``, which is the code of a component.

    Raises:
        PluginError: it raised something that is not torchweld's own; names the component.
    """
    assert chosen is not None, "as in build"
    try:
        return work()
    except TorchweldError:
        raise
    except Exception as error:
        origin = chosen.origin
        who = f" of {origin.distribution} {origin.version}" if origin.distribution else ""
        raise PluginError(
            f"{chosen.phase} {chosen.name!r}{who} could not be {doing}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_devices(devices: int | None, ranks: Ranks) -> None:
    if devices is None or devices == ranks.world_size:
        return
    processes = "process was" if ranks.world_size == 1 else "processes were"
    raise InvalidArgument(
        f"devices={devices} was asked for, but {ranks.world_size} {processes} launched: start the "
        f"script with torchrun --nproc-per-node {devices} script.py"
    )

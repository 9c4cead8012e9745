"""What would be different if a checkpoint went on under another plan, and what would be refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchweld.checkpoint.position import Reading, batch_here
from torchweld.errors import CheckpointError

if TYPE_CHECKING:
    from torchweld.plan import Plan

_CASTS = "bf16-true"
_EFFECTS = {
    "accumulate_grad_batches": "the window of a step",
    "accelerator": "rounding differs between devices",
    "activation_checkpointing": "memory and speed",
    "compile": "speed; rounding may differ",
    "gradient_clip_algorithm": "from the next step on",
    "gradient_clip_val": "from the next step on",
    "precision": "rounding of the steps; what is kept has the same dtype",
    "seed": "the saved order of samples goes on",
}


@dataclass(frozen=True)
class Change:
    """One thing that the resumed run would do otherwise, or that keeps it from resuming.

    Attributes:
        what: e.g. ``"processes"``.
        before: as saved.
        now: under the plan.
        effect: what follows.
        refused: the run would stop before its first step.
    """

    what: str
    before: str
    now: str
    effect: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Under:
    """The plan that would resume.

    Attributes:
        plan: with the facts of the run that was saved, where they are of its model and loss.
        world_size: number of processes.
        model_digest: of the model after the plan's surgeries; None where nobody built it.
        edits_model: whether the surgery of this name may change names, shapes or dtypes.
    """

    plan: Plan
    world_size: int
    model_digest: str | None = None
    edits_model: Callable[[str], bool] = lambda _name: True


def saved_plan(header: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of the run that wrote a checkpoint.

    Raises:
        CheckpointError: no run wrote it.
    """
    plan = header.get("plan")
    plan = json.loads(plan) if isinstance(plan, str) else plan
    if not isinstance(plan, Mapping) or "data" not in header:
        raise CheckpointError(
            "the checkpoint was not written by a run, so there is no plan to compare with"
        )
    return dict(plan)


def find_changes(header: Mapping[str, Any], under: Under) -> list[Change]:
    """Compare a checkpoint's header with a plan; the position in the data comes always, and last.

    Raises:
        CheckpointError: no run wrote the checkpoint.
    """
    before, now = saved_plan(header), json.loads(under.plan.to_json())
    return [
        *_model_changes(header, under),
        *_component_changes(before, now, under),
        *_setting_changes(before["settings"], now["settings"]),
        *_world_changes(header["data"], under),
        _position(header, before, now, under),
    ]


# ---- model and components ------------------------------------------------------------------------


def _model_changes(header: Mapping[str, Any], under: Under) -> Iterator[Change]:
    saved, mine = header["model_digest"], under.model_digest
    if mine is not None and mine != saved:
        effect = "another model: names, shapes or dtypes differ"
        yield Change("model", saved[:6], mine[:6], effect, refused=True)


def _component_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], under: Under
) -> Iterator[Change]:
    old, new = _components(before), _components(now)
    for place in sorted(old.keys() | new.keys()):
        was, will = old.get(place), new.get(place)
        if was == will:
            continue
        if place.startswith("surgery"):
            yield _surgery_change(was, will, under)
        elif _name(was) != _name(will):
            effect = "every strategy reads what another wrote" if place == "strategy" else ""
            yield Change(place, _name(was), _name(will), effect)
        else:
            yield Change(f"{place} {_name(was)}", *_different(was, will))


def _components(plan: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By place: strategies and data sources by phase, surgeries by phase and name."""
    found: dict[str, Mapping[str, Any]] = {}
    for part in plan["order"]:
        split = f" ({part['split']})" if part["split"] else ""
        name = f" {part['name']}" if part["phase"] == "surgery" else ""
        facts = {"version": f"{part['distribution']} {part['version']}".strip()}
        found[f"{part['phase']}{split}{name}"] = {
            "name": part["name"],
            **{key: str(value) for key, value in part["options"].items()},
            **facts,
        }
    return found


def _surgery_change(
    was: Mapping[str, Any] | None, will: Mapping[str, Any] | None, under: Under
) -> Change:
    name = _name(was) if was is not None else _name(will)
    before, now = ("without", "with") if was is None else ("with", "without")
    if was is not None and will is not None:
        before, now = _different(was, will)
    if under.model_digest is not None or not under.edits_model(name):
        return Change(f"surgery {name}", before, now, "from the next step on")
    effect = (
        "another model, unless names, shapes and dtypes stay as they are: "
        "give --model pkg:make to know"
    )
    return Change(f"surgery {name}", before, now, effect, refused=True)


def _name(component: Mapping[str, Any] | None) -> str:
    return "none" if component is None else str(component["name"])


def _different(was: Mapping[str, Any] | None, will: Mapping[str, Any] | None) -> tuple[str, str]:
    """The options (and the version) that differ, as ``key=value``."""
    was, will = was or {}, will or {}
    keys = [key for key in (was.keys() | will.keys()) if was.get(key) != will.get(key)]
    old, new = ("  ".join(f"{k}={d.get(k, 'none')}" for k in sorted(keys)) for d in (was, will))
    return old, new


# ---- settings, processes, position ---------------------------------------------------------------


def _setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        casts = name == "precision" and _CASTS in {old, new}
        effect = "weights of another dtype" if casts else _EFFECTS.get(name, "")
        yield Change(name, _shown(old), _shown(new), effect, refused=casts)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _world_changes(data: Mapping[str, Any], under: Under) -> Iterator[Change]:
    before, now = int(data["world_size"]), under.world_size
    if before != now:
        yield Change("processes", str(before), str(now), "random states are new ones")
    reading = _reading(data, under)
    old = _samples(data["batch_size"], before, int(data["accumulate"]))
    new = _samples(reading.batch_size, now, reading.accumulate)
    if old != new:
        yield Change("samples a step", old, new, "learning rates may have to follow")


def _samples(batch_size: int | None, world_size: int, accumulate: int) -> str:
    return "unknown" if batch_size is None else str(batch_size * world_size * accumulate)


def _reading(data: Mapping[str, Any], under: Under) -> Reading:
    """How the plan reads; a batch size that it does not know stays what it was."""
    assert under.plan.data is not None, "a plan without errors has a data source"
    given = getattr(under.plan.data.options, "batch_size", None)
    return Reading(
        data["batch_size"] if given is None else given,
        under.world_size,
        under.plan.settings.accumulate_grad_batches,
        has_length=data.get("batches_per_epoch", 0) is not None,
    )


def _position(
    header: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any], under: Under
) -> Change:
    data, epoch = header["data"], int(header["epoch"]) + 1
    place = _place(int(data["batch"]), epoch)
    try:
        batch = batch_here(data, _reading(data, under))
    except CheckpointError as error:
        return Change("data position", place, "none", str(error), refused=True)
    sources = [_name(_components(plan).get("data")) for plan in (before, now)]
    exact = sources[0] == sources[1] or not batch
    effect = "exact" if exact else "not exact: another source has another order of samples"
    return Change("data position", place, _place(batch, epoch), effect)


def _place(batch: int, epoch: int) -> str:
    return f"batch {batch} of epoch {epoch}" if batch else f"the beginning of epoch {epoch}"

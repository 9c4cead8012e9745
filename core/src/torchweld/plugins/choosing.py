"""From what a user wrote to a component with options; what is wrong with it as problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torchweld.claims import Phase
from torchweld.components import Choice, Chosen, Component, Origin, Use
from torchweld.guard import attempt, one_line
from torchweld.plugins.discovery import AUTOLOAD, DISABLE, Broken, names_of
from torchweld.plugins.given import Given, from_object, given_options, remember
from torchweld.plugins.inventory import Inventory
from torchweld.plugins.offers import Offered, api_fault, component_faults
from torchweld.plugins.options import build_options, one_line_repr
from torchweld.plugins.requirements import compare, needs
from torchweld.problems import Problem
from torchweld.spelling import canonical, closest, listing

OUR_PLUGINS: Mapping[str, tuple[str, ...]] = {
    "torchweld-deepspeed": ("deepspeed",),
    "torchweld-fsdp": ("fsdp",),
    "torchweld-ffcv": ("ffcv",),
    "torchweld-composer": (
        "composer",
        "blurpool",
        "channels_last",
        "cutmix",
        "label_smoothing",
    ),
}
"""The one place where core names plugins: our own four, for "did you mean" when not installed.

A distribution's name is never made from what a user typed, since anybody may register that name.
"""

WORDS: Mapping[Phase, str] = {"strategy": "strategy", "data": "data source", "surgery": "surgery"}
"""What a component of a phase is called in messages."""


@dataclass(frozen=True)
class _Pick:
    """A component that was found, with what its name stands for."""

    component: Component
    origin: Origin = field(default_factory=Origin)
    options: Mapping[str, object] = field(default_factory=dict)
    bare: bool = False


def choose(
    stock: Inventory, choice: Choice, phase: Phase, *, split: str, position: int | None
) -> tuple[Chosen | None, list[Problem]]:
    """Find what ``choice`` means and give it its options; see ``Registry.choose``."""
    asked = choice if isinstance(choice, Use) else Use(choice)
    pick, problems = _find(stock, asked.name, phase)
    if pick is None:
        return None, problems
    component = pick.component
    given = {**pick.options, **asked.options}
    if component.options is Given and asked.options:
        problems += build_options(component.name, None, asked.options)[1]
        given = dict(pick.options)
    options, wrong = build_options(component.name, component.options, given)
    problems += wrong
    if options is None and component.options is not None:
        return None, problems
    chosen = Chosen(
        phase,
        component,
        options,
        pick.origin,
        after=asked.after,
        position=position if pick.bare else None,
        split="val" if split == "val" else "",
    )
    return chosen, problems


def usable(stock: Inventory) -> list[Offered]:
    """What could be chosen without a problem."""
    twice = [item for group in stock.duplicates() for item in group]
    found = compare(item.component.needs for item in stock.offered)
    return [
        item
        for item in stock.offered
        if all(need.met for need in found[tuple(item.component.needs)])
        and not api_fault(item.component)
        and not stock.faults_of(item)
        and item not in twice
    ]


def _find(stock: Inventory, name: object, phase: Phase) -> tuple[_Pick | None, list[Problem]]:
    if isinstance(name, str):
        return _by_name(stock, name, phase)
    if isinstance(name, Component):
        return _direct(stock, name, phase)
    return _by_object(stock, name, phase)


def _by_name(stock: Inventory, name: str, phase: Phase) -> tuple[_Pick | None, list[Problem]]:
    items = stock.named(phase, name)
    if not items:
        return None, [_absent(stock, name, phase)]
    if len(items) > 1:
        return None, [_ambiguous(name, phase, items)]
    item = items[0]
    presets = {} if name == item.component.name else item.component.presets[name]
    faults = [_is_broken(name, phase, fault) for fault in stock.faults_of(item)]
    return _Pick(item.component, item.origin, presets), faults + _requirements(item.component)


def _direct(
    stock: Inventory, component: Component, phase: Phase
) -> tuple[_Pick | None, list[Problem]]:
    faults = component_faults(component)
    if faults:
        what = f"the {WORDS[phase]} {one_line_repr(component.name)} cannot be used"
        return None, [
            Problem("TW105", "error", what, "; ".join(faults), who=(str(component.name),))
        ]
    origins = [item.origin for item in stock.offered if item.component is component]
    origin = origins[0] if origins else Origin()
    return _Pick(component, origin), _requirements(component)


def _by_object(stock: Inventory, obj: object, phase: Phase) -> tuple[_Pick | None, list[Problem]]:
    picks, problems = _adopted(stock, obj, phase)
    if len(picks) > 1:
        return None, [*problems, _adopted_twice(obj, phase, picks)]
    if picks:
        return picks[0], problems + _requirements(picks[0].component)
    own = from_object(obj) if phase == "surgery" else None
    if own is not None:
        return _Pick(own, options=given_options(own, obj), bare=True), problems
    return None, [*problems, _not_a_choice(obj, phase)]


def _adopted(stock: Inventory, obj: object, phase: Phase) -> tuple[list[_Pick], list[Problem]]:
    """Ask every plugin; one that fails on an object which may not be its own is a warning."""
    picks: list[_Pick] = []
    problems: list[Problem] = []
    for plugin in stock.plugins:
        adopt = plugin.hooks.get("torchweld_adopt")
        if adopt is None:
            continue
        answer = attempt(adopt, obj=obj, phase=phase)
        faults = [f"it raised {one_line(answer.error)}"] if answer.error else []
        if answer.value is not None:
            faults = component_faults(answer.value)
        if faults:
            problems.append(_cannot_adopt(plugin.origin, obj, "; ".join(faults)))
        elif isinstance(answer.value, Component):
            component = remember(answer.value)
            picks.append(_Pick(component, plugin.origin, given_options(component, obj)))
    return picks, problems


def _requirements(component: Component) -> list[Problem]:
    name = component.name
    fault = api_fault(component)
    if fault:
        fix = "upgrade torchweld, or take an older version of the plugin"
        return [Problem("TW106", "error", fault, fix=fix, who=(name,))]
    return [
        Problem(
            "TW106",
            "error",
            f"{name} needs {need.finding}",
            fix=f"install {need.requirement}",
            who=(name,),
        )
        for need in needs(component.needs)
        if not need.met
    ]


def _absent(stock: Inventory, name: str, phase: Phase) -> Problem:
    """The most helpful word on a name that is not offered."""
    for broken in stock.broken:
        if canonical(name) in names_of(broken) and not broken.component:
            return _is_broken(name, phase, broken)
    off = {n for found in stock.disabled for n in names_of(found)}
    off |= {canonical(item.component.name) for item in stock.switched_off}
    if canonical(name) in off:
        what = f"the {WORDS[phase]} {name!r} is switched off"
        return Problem("TW101", "error", what, f"{DISABLE} names it", who=(name,))
    return _unknown(stock, name, phase)


def _unknown(stock: Inventory, name: str, phase: Phase) -> Problem:
    names = {item.component.name for item in stock.offered if item.phase == phase}
    why = f"installed: {listing(names)}"
    if not stock.autoload:
        why += f"; {AUTOLOAD} leaves only what core itself offers"
    fixes = [
        *_elsewhere(stock, name, phase),
        *_meant(name, names),
        *_perhaps_broken(stock),
    ]
    what = f"no {WORDS[phase]} is called {name!r}"
    return Problem("TW101", "error", what, why, "; ".join(fixes), who=(name,))


def _elsewhere(stock: Inventory, name: str, phase: Phase) -> list[str]:
    phases = [other for other in WORDS if other != phase and stock.named(other, name)]
    return [f"{name!r} is a {WORDS[other]}: {other}={name}" for other in phases]


def _meant(name: str, installed: set[str]) -> list[str]:
    ours = {word: dist for dist, words in OUR_PLUGINS.items() for word in words}
    found = closest(name, installed) or closest(name, ours)
    if not found:
        return []
    where = f" it is in the distribution {ours[found]}" if found not in installed else ""
    return [f"did you mean {found!r}?{where}" if found != name else where.strip()]


def _perhaps_broken(stock: Inventory) -> list[str]:
    labels = sorted({broken.label for broken in stock.broken})
    if not labels:
        return []
    verb = "is" if len(labels) == 1 else "are"
    return [f"{', '.join(labels)} {verb} broken and may offer it (torchweld plugins says why)"]


def _ambiguous(name: str, phase: Phase, items: tuple[Offered, ...]) -> Problem:
    places = [f"{i.origin.distribution} {i.origin.version}".strip() for i in items]
    distributions = sorted({item.origin.distribution for item in items})
    return Problem(
        "TW104",
        "error",
        f"the {WORDS[phase]} {name!r} is offered by {' and by '.join(places)}",
        why="which of them is meant cannot be known",
        fix=f"uninstall one, or switch one off: {DISABLE}={distributions[-1]}",
        who=tuple(distributions),
    )


def _is_broken(name: str, phase: Phase, broken: Broken) -> Problem:
    plugin = f"{broken.label} {broken.version}".strip()
    what = f"the {WORDS[phase]} {name!r} cannot be used: {plugin} is broken"
    return Problem("TW105", "error", what, broken.error, broken.hint, who=(name,))


def _adopted_twice(obj: object, phase: Phase, picks: list[_Pick]) -> Problem:
    distributions = sorted({pick.origin.distribution for pick in picks})
    what = f"the {WORDS[phase]} {one_line_repr(obj)} is adopted by {' and by '.join(distributions)}"
    fix = f"switch one off: {DISABLE}={distributions[-1]}"
    return Problem("TW104", "error", what, fix=fix, who=tuple(distributions))


def _cannot_adopt(origin: Origin, obj: object, fault: str) -> Problem:
    what = f"torchweld_adopt of {origin.distribution} fails for {one_line_repr(obj)}"
    return Problem("TW105", "warning", what, fault, who=(origin.distribution,))


def _not_a_choice(obj: object, phase: Phase) -> Problem:
    kind = type(obj)
    where = f"{kind.__module__}.{kind.__qualname__}"
    own = ", or a function that takes the parts and returns them" if phase == "surgery" else ""
    takes = f"a {WORDS[phase]} is a name, use(...), a Component, an object that a plugin adopts"
    top = {base.__module__.partition(".")[0] for base in kind.__mro__}
    fixes = [f"{dist} adopts it" for dist, words in OUR_PLUGINS.items() if top & set(words)]
    if isinstance(obj, type):
        fixes = [f"give an instance: {obj.__name__}(...)"]
    what = f"{one_line_repr(obj)} is no {WORDS[phase]}, and no installed plugin adopts {where}"
    return Problem("TW101", "error", what, takes + own, "; ".join(fixes), who=(where,))

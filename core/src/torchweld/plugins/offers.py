"""What one plugin offers: its hooks called alone, everything wrong with it as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, cast

import pluggy

from torchweld import hookspecs
from torchweld.claims import Claims, Phase
from torchweld.components import API, Component, Origin
from torchweld.guard import attempt, one_line
from torchweld.plugins.requirements import malformed
from torchweld.spelling import did_you_mean, listing

PHASE_HOOKS: Mapping[Phase, str] = {
    "strategy": "torchweld_strategies",
    "data": "torchweld_data_sources",
    "surgery": "torchweld_surgeries",
}
"""The hook that offers components of a phase."""

_ARGUMENTS = {
    name: tuple(inspect.signature(spec).parameters)
    for name, spec in vars(hookspecs).items()
    if name.startswith("torchweld_")
}


@dataclass(frozen=True)
class Offered:
    """One component that can be chosen by name."""

    phase: Phase
    component: Component
    origin: Origin = field(default_factory=Origin)
    entry_point: str = ""


@dataclass(frozen=True)
class Plugin:
    """One plugin, read.

    Attributes:
        entry_point: its name there, also the name of its sub-commands.
        hooks: the implementations that can be called, by name of the hook.
        offered: what it offers; also of a plugin with faults, as far as it could be read.
        faults: all that is wrong with it, one clause each; empty for a good one.
    """

    entry_point: str
    origin: Origin
    hooks: Mapping[str, Callable[..., Any]]
    offered: tuple[Offered, ...] = ()
    faults: tuple[str, ...] = ()


def read_plugin(plugin: object, entry_point: str, origin: Origin) -> Plugin:
    """Check the hooks of ``plugin``, then ask it for its components."""
    scanned = attempt(_scan, plugin)
    if scanned.value is None:
        fault = f"its hooks cannot be read: {one_line(scanned.error)}" if scanned.error else ""
        return Plugin(entry_point, origin, {}, faults=(fault,))
    hooks, faults = scanned.value
    offered: list[Offered] = []
    for phase, hook in PHASE_HOOKS.items():
        if hook in hooks:
            components, wrong = components_of(hook, hooks[hook])
            offered += [Offered(phase, item, origin, entry_point) for item in components]
            faults += wrong
    return Plugin(entry_point, origin, hooks, tuple(offered), tuple(faults))


def components_of(hook: str, call: Callable[..., Any]) -> tuple[list[Component], list[str]]:
    """Call one of the phase hooks: the components it offers, and what is wrong with it."""
    items, fault = items_of(hook, call)
    components: list[Component] = []
    faults = [fault] if fault else []
    for item in items:
        wrong = component_faults(item)
        if wrong:
            faults.append(f"{hook} offers {_name(item)}: {'; '.join(wrong)}")
        else:
            components.append(cast("Component", item))
    return components, faults


def items_of(hook: str, call: Callable[..., Any], **arguments: object) -> tuple[list[Any], str]:
    """Call a hook that returns an iterable: its items, and what is wrong, or ``""``."""
    answer = attempt(call, **arguments)
    if answer.error is not None:
        return [], f"{hook} raised {one_line(answer.error)}"
    if not isinstance(answer.value, Iterable) or isinstance(answer.value, (str, bytes, Mapping)):
        return [], f"{hook} returned {type(answer.value).__name__}, not a list"
    values: Iterable[Any] = answer.value
    items = attempt(list, values)
    if items.error is not None:
        return [], f"{hook} raised {one_line(items.error)}"
    return items.value or [], ""


def component_faults(component: object) -> list[str]:
    """All that makes ``component`` unusable, one clause each; a newer ``api`` is none of them."""
    if not isinstance(component, Component):
        return [f"it is of type {type(component).__name__}, not Component"]
    checked = attempt(lambda: list(_faults(component)))
    if checked.error is not None:
        return [f"it cannot be read: {one_line(checked.error)}"]
    return checked.value or []


def api_fault(component: Component) -> str:
    """Say that a component was written for newer contracts than these; ``""`` when it was not."""
    if component.api <= API:
        return ""
    return f"{component.name!r} was written for api {component.api}, this torchweld has api {API}"


def _scan(plugin: object) -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """Return the usable hooks of ``plugin``, bound, and what is wrong with the others."""
    if inspect.isclass(plugin):
        # pluggy registers a class without a word, and fails when a hook is called.
        return {}, [f"it is the class {plugin.__name__!r}, not a module or an instance"]
    hooks: dict[str, Callable[..., Any]] = {}
    faults: list[str] = []
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    for attribute in sorted(dir(plugin)):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            faults += _unmarked(plugin, attribute)
            continue
        hook = options.get("specname") or attribute
        method = getattr(plugin, attribute)
        wrong = _hook_faults(hook, method, options)
        faults += wrong
        if not wrong and hook in _ARGUMENTS:
            hooks[hook] = _with_known_arguments(method)
    if not hooks and not faults:
        faults = ["it implements no hook (is each function marked with torchweld.hookimpl?)"]
    return hooks, faults


def _unmarked(plugin: object, attribute: str) -> list[str]:
    if attribute in _ARGUMENTS and inspect.isroutine(getattr(plugin, attribute)):
        return [f"{attribute} is not marked with torchweld.hookimpl"]
    return []


def _hook_faults(hook: str, method: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    if hook not in _ARGUMENTS:
        if options.get("optionalhook"):  # a hook of a later torchweld, and the plugin says so
            return []
        meant = did_you_mean(hook, _ARGUMENTS) or f"the hooks are {listing(_ARGUMENTS)}"
        return [f"there is no hook {hook!r}; {meant}"]
    if options.get("wrapper") or options.get("hookwrapper"):
        return [f"{hook} is a hook wrapper, which torchweld does not call"]
    return list(_argument_faults(hook, method))


def _argument_faults(hook: str, method: Callable[..., Any]) -> Iterable[str]:
    known = _ARGUMENTS[hook]
    takes = f"it takes ({', '.join(known)})"
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            yield f"{hook} takes *{name}, which receives nothing; {takes}"
        elif parameter.kind is parameter.KEYWORD_ONLY:
            yield f"{hook} takes {name!r} by keyword only, which a hook never gets; {takes}"
        elif name not in known:
            yield f"{hook} has no argument {name!r}; {takes}"


def _with_known_arguments(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let an implementation take fewer arguments than its hook has."""
    names = tuple(inspect.signature(method).parameters)

    def call(**arguments: object) -> Any:
        # By position: a parameter may be positional-only.
        return method(*(arguments[name] for name in names))

    return call


def _faults(component: Component) -> Iterable[str]:
    yield from _name_faults(component.name)
    if not isinstance(component.summary, str):
        yield f"summary={component.summary!r} is not a string"
    if not _builds(component.build):
        yield f"build={component.build!r} is neither 'module:object' nor callable"
    if component.options is not None and not _is_frozen(component.options):
        yield f"options={component.options!r} is not a frozen dataclass"
    if not isinstance(component.claims, Claims) and not callable(component.claims):
        yield f"claims={component.claims!r} is neither Claims nor a function that returns them"
    if type(component.api) is not int or component.api < 1:
        yield f"api={component.api!r} is not a number from 1"
    yield from _needs_faults(component.needs)
    if not isinstance(component.presets, Mapping):
        yield f"presets={component.presets!r} is not a mapping of names to options"


def _name_faults(name: object) -> Iterable[str]:
    if not isinstance(name, str) or not name.strip():
        yield f"name={name!r} is not a name"
    elif any(sign in name for sign in ",:= \t\n'\""):
        yield f"name={name!r} has a sign that the command line cannot take"


def _needs_faults(needs: object) -> Iterable[str]:
    if isinstance(needs, str) or not isinstance(needs, Sequence):
        yield f"needs={needs!r} is not a list of requirements"
    else:
        yield from (f"needs: {text!r} is no requirement" for text in malformed(needs))


def _builds(build: object) -> bool:
    if not isinstance(build, str):
        return callable(build)
    module, colon, attribute = build.partition(":")
    return bool(colon) and all(p.isidentifier() for p in [*module.split("."), attribute])


def _is_frozen(options: object) -> bool:
    if not inspect.isclass(options) or not is_dataclass(options):
        return False
    return bool(cast("Any", options).__dataclass_params__.frozen)


def _name(item: object) -> str:
    return repr(item.name) if isinstance(item, Component) else "something else"

"""Taking stock: the plugins of this environment read once, with all that is wrong as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torchweld import builtin
from torchweld.claims import Phase
from torchweld.components import Origin
from torchweld.plugins.discovery import (
    DISABLE,
    Broken,
    Found,
    autoload,
    disabled_names,
    discover,
    load,
    names_of,
    switch_off_hint,
)
from torchweld.plugins.offers import Offered, Plugin, api_fault, read_plugin
from torchweld.plugins.requirements import installed_version
from torchweld.problems import Problem
from torchweld.spelling import canonical, did_you_mean, listing

_CORE = "torchweld"


@dataclass(frozen=True)
class Inventory:
    """What is there to choose from; every tuple is sorted.

    Attributes:
        plugins: built-ins first, then by distribution and entry point.
        offered: what can be chosen by name, also of plugins with faults.
        broken: what is installed and faulty.
        disabled: entry points that were switched off before they were imported.
        switched_off: components that were switched off by their own name.
        shadowed: further copies of a distribution.
        notices: warnings about the kill switches, which become part of every plan.
        autoload: False when installed plugins were left alone.
    """

    plugins: tuple[Plugin, ...] = ()
    offered: tuple[Offered, ...] = ()
    broken: tuple[Broken, ...] = ()
    disabled: tuple[Found, ...] = ()
    switched_off: tuple[Offered, ...] = ()
    shadowed: tuple[Found, ...] = ()
    notices: tuple[Problem, ...] = ()
    autoload: bool = True

    def named(self, phase: Phase, name: str) -> tuple[Offered, ...]:
        """What is offered under ``name``, a component's own or a preset's."""
        return tuple(
            item
            for item in self.offered
            if item.phase == phase
            and (item.component.name == name or name in item.component.presets)
        )

    def duplicates(self) -> tuple[tuple[Offered, ...], ...]:
        """Groups of components of one phase and name from different places."""
        keys = sorted({(item.phase, item.component.name) for item in self.offered})
        groups = (self.named(phase, name) for phase, name in keys)
        return tuple(group for group in groups if len(group) > 1)

    def faults_of(self, item: Offered) -> tuple[Broken, ...]:
        """What is wrong with the plugin that offers ``item``."""
        return tuple(
            b
            for b in self.broken
            if (b.entry_point, b.distribution) == (item.entry_point, item.origin.distribution)
            and not b.component
        )


def take_stock(environ: Mapping[str, str]) -> Inventory:
    """Discover, import and read the installed plugins."""
    discovery = discover(environ)
    plugins: list[Plugin] = []
    broken: list[Broken] = list(discovery.broken)
    for found in discovery.found:
        loaded, wrong = load(found)
        if wrong is not None:
            broken.append(wrong)
            continue
        origin = Origin(found.distribution, found.version, found.location)
        plugins.append(read_plugin(loaded, found.entry_point, origin))
    stock = replace(
        _stock([_core(), *plugins], broken),
        disabled=discovery.disabled,
        shadowed=discovery.shadowed,
        autoload=autoload(environ),
    )
    return _switch_off(stock, disabled_names(environ))


def stock_of(plugins: Mapping[str, object] | Sequence[object], *, builtins: bool) -> Inventory:
    """Read the plugins that are given, as if each were an entry point of its name."""
    named = plugins.items() if isinstance(plugins, Mapping) else [(_name(p), p) for p in plugins]
    read = [read_plugin(plugin, name, Origin(name)) for name, plugin in named]
    return _stock([_core(), *read] if builtins else read, [])


def _core() -> Plugin:
    return read_plugin(builtin, "", Origin(_CORE, installed_version(_CORE)))


def _name(plugin: object) -> str:
    return str(getattr(plugin, "__name__", type(plugin).__name__))


def _stock(plugins: Sequence[Plugin], broken: Iterable[Broken]) -> Inventory:
    items: list[Offered] = []
    for item in (item for plugin in plugins for item in plugin.offered):
        # One module behind two entry points of a distribution offers everything twice.
        if not any(item.component is i.component and item.origin == i.origin for i in items):
            items.append(item)
    faulty = [_faulty(plugin) for plugin in plugins if plugin.faults]
    too_new = [_too_new(item) for item in items if api_fault(item.component)]
    return Inventory(
        plugins=tuple(plugins),
        offered=tuple(sorted(items, key=_sort_key)),
        broken=tuple(sorted([*broken, *faulty, *too_new], key=lambda b: (b.label, b.entry_point))),
    )


def _sort_key(item: Offered) -> tuple[str, ...]:
    return (item.phase, item.component.name, item.origin.distribution, item.entry_point)


def _faulty(plugin: Plugin) -> Broken:
    where, name = plugin.origin, plugin.entry_point
    error = "; ".join(plugin.faults)
    hint = switch_off_hint(name)
    return Broken(name, where.distribution, where.version, where.location, error, hint)


def _too_new(item: Offered) -> Broken:
    where = item.origin
    return Broken(
        item.entry_point,
        where.distribution,
        where.version,
        where.location,
        api_fault(item.component),
        "upgrade torchweld, or take an older version of the plugin",
        component=item.component.name,
    )


def _switch_off(stock: Inventory, names: Sequence[str]) -> Inventory:
    """Take out components named by their own name; warn about names that nothing has."""
    off = {canonical(name) for name in names}
    gone = tuple(item for item in stock.offered if canonical(item.component.name) in off)
    taken = {name for found in stock.disabled for name in names_of(found)}
    taken |= {canonical(item.component.name) for item in gone}
    # With autoload off nobody has looked whether a name exists.
    strange = [n for n in names if canonical(n) not in taken] if stock.autoload else []
    return replace(
        stock,
        offered=tuple(item for item in stock.offered if item not in gone),
        switched_off=gone,
        notices=tuple(_unknown(stock, name) for name in strange),
    )


def _unknown(stock: Inventory, name: str) -> Problem:
    known = {item.component.name for item in stock.offered}
    known |= {plugin.entry_point for plugin in stock.plugins if plugin.entry_point}
    known |= {b.entry_point for b in stock.broken if b.entry_point}
    known |= {found.entry_point for found in stock.disabled}
    return Problem(
        "TW101",
        "warning",
        f"{DISABLE} names {name!r}, which nothing installed is called",
        why=f"it can switch off: {listing(known)}",
        fix=did_you_mean(name, known),
        who=(name,),
    )

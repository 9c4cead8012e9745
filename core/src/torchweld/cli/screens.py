"""What ``torchweld plugins`` and ``torchweld doctor`` show, as text and as data."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torchweld.claims import Phase
from torchweld.plugins.discovery import Broken, Found, outside_site_packages
from torchweld.plugins.inventory import Inventory
from torchweld.plugins.offers import Offered
from torchweld.plugins.options import option_rows
from torchweld.plugins.requirements import Need, compare, installed_version

_WIDTH = 100
_ORDER: tuple[Phase, ...] = ("strategy", "data", "surgery")
_VERSIONS = ("torch", "pluggy", "importlib-metadata")
_LABEL = 11


def plugins_text(stock: Inventory) -> str:
    """Every component with its distribution, then everything that is wrong."""
    found = compare(item.component.needs for item in stock.offered)
    rows = [_row(item, found[tuple(item.component.needs)]) for item in _in_order(stock)]
    name, summary = (max((len(row[i]) for row in rows), default=0) + 3 for i in (1, 2))
    lines, shown = [], ""
    for phase, *cells in rows:
        lines.append(
            f"{phase if phase != shown else '':<{_LABEL}}{cells[0]:<{name}}"
            f"{cells[1]:<{summary}}{cells[2]}".rstrip()
        )
        shown = phase
    return "\n".join([*lines, *_faults(stock)])


def plugins_data(stock: Inventory) -> dict[str, Any]:
    """The same as data; keys are added, never changed."""
    found = compare(item.component.needs for item in stock.offered)
    return {
        "components": [
            _component(item, found[tuple(item.component.needs)]) for item in _in_order(stock)
        ],
        "broken": [vars(broken) for broken in stock.broken],
        "disabled": [_found(found) for found in stock.disabled],
        "switched_off": [item.component.name for item in stock.switched_off],
        "duplicates": [[_place(item) for item in group] for group in stock.duplicates()],
        "shadowed": [_found(found) for found in stock.shadowed],
        "warnings": [notice.what for notice in stock.notices],
        "autoload": stock.autoload,
    }


def doctor_text(
    stock: Inventory,
    faults: Sequence[Broken] = (),
    advice: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """What a bug report needs: versions, plugins, and everything that is wrong with them.

    Args:
        stock: what is installed.
        faults: plugins whose commands or advice cannot be had.
        advice: what plugins say that this machine lacks, by entry point.
    """
    versions = [f"{name} {installed_version(name) or 'not installed'}" for name in _VERSIONS]
    lines = [
        f"{'python':<{_LABEL}}{platform.python_version()} on {platform.platform()}",
        f"{'torchweld':<{_LABEL}}{installed_version('torchweld')}   {'   '.join(versions)}",
        *_plugin_lines(stock),
        *_unmet_lines(stock),
        *_faults(stock),
        *(line for fault in faults for line in _broken(fault)),
        *(f"{name:<{_LABEL}}{line}" for name, lines in advice.items() for line in lines),
    ]
    healthy = not stock.broken and not faults and not advice
    return "\n".join([*lines, *([] if not healthy else ["nothing is broken"])])


def broken_line(broken: Broken) -> str:
    """One line that says what cannot be used."""
    return f"{broken.label}   {_error(broken)}"


def _in_order(stock: Inventory) -> list[Offered]:
    return sorted(stock.offered, key=lambda item: _ORDER.index(item.phase))


def _row(item: Offered, found: Sequence[Need]) -> tuple[str, str, str, str]:
    versions = "   ".join(_need(need) for need in found)
    return item.phase, item.component.name, item.component.summary, f"{_place(item)}   {versions}"


def _need(need: Need) -> str:
    return f"{need.name} {need.installed}" if need.met else f"needs {need.finding}"


def _place(item: Offered) -> str:
    place = f"{item.origin.distribution} {item.origin.version}".strip()
    return f"{place} ({_mark(item.origin.location)})" if _mark(item.origin.location) else place


def _mark(location: str) -> str:
    """Say where a plugin is that no installer put there: code of the working directory, say."""
    return f"outside site-packages: {location}" if outside_site_packages(location) else ""


def _faults(stock: Inventory) -> Iterator[str]:
    for broken in stock.broken:
        yield from _broken(broken)
    for group in stock.duplicates():
        places = " and by ".join(_place(item) for item in group)
        yield from _labelled("twice", f"{group[0].component.name} is offered by {places}")
    for found in stock.disabled:
        yield from _labelled("disabled", f"{found.entry_point}   {_distribution(found)}")
    for item in stock.switched_off:
        yield from _labelled("disabled", f"{item.component.name}   {_place(item)}")
    for found in stock.shadowed:
        where = f"in {found.location} is hidden by a copy that comes first"
        yield from _labelled("shadowed", f"{_distribution(found)} {where}")
    for notice in stock.notices:
        text = "; ".join(part for part in (notice.what, notice.why, notice.fix) if part)
        yield from _labelled("warning", text)
    if not stock.autoload:
        yield from _labelled("autoload", "off: only what core itself offers")


def _broken(broken: Broken) -> Iterator[str]:
    name, indent = broken.label, " " * (_LABEL + 18)
    mark = _mark(broken.location)
    text = _error(broken) + (f" ({mark})" if mark else "")
    yield from _wrapped(f"{'broken':<{_LABEL}}{name:<17} ", text, indent)
    if broken.hint:
        yield from _wrapped(indent, broken.hint, indent)


def _error(broken: Broken) -> str:
    return f"{broken.version}: {broken.error}" if broken.version else broken.error


def _labelled(label: str, text: str) -> Iterator[str]:
    return _wrapped(f"{label:<{_LABEL}}", text, " " * _LABEL)


def _wrapped(first: str, text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plugin_lines(stock: Inventory) -> Iterator[str]:
    for plugin in stock.plugins:
        if not plugin.entry_point:
            continue
        place = f"{plugin.origin.distribution} {plugin.origin.version}".strip()
        count = f"{len(plugin.offered)} component{'' if len(plugin.offered) == 1 else 's'}"
        mark = _mark(plugin.origin.location)
        text = "   ".join(part for part in (plugin.entry_point, place, count, mark) if part)
        yield from _labelled("plugin", text)


def _unmet_lines(stock: Inventory) -> Iterator[str]:
    found = compare(item.component.needs for item in stock.offered)
    for item in stock.offered:
        for need in found[tuple(item.component.needs)]:
            if not need.met:
                yield from _labelled("unmet", f"{item.component.name} needs {need.finding}")


def _distribution(found: Found) -> str:
    return f"{found.distribution} {found.version}".strip()


def _found(found: Found) -> dict[str, str]:
    names = ("entry_point", "distribution", "version", "location")
    return {name: getattr(found, name) for name in names}


def _component(item: Offered, found: Sequence[Need]) -> dict[str, Any]:
    component = item.component
    return {
        "phase": item.phase,
        "name": component.name,
        "summary": component.summary,
        "distribution": item.origin.distribution,
        "version": item.origin.version,
        "location": item.origin.location,
        "outside_site_packages": outside_site_packages(item.origin.location),
        "entry_point": item.entry_point,
        "api": component.api,
        "options": [
            {"name": name, "type": kind, "default": default}
            for name, kind, default in option_rows(component.options)
        ],
        "presets": sorted(component.presets),
        "needs": [
            {"requirement": need.requirement, "installed": need.installed, "met": need.met}
            for need in found
        ],
    }

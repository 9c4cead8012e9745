"""Finding installed plugins: a guarded, sorted loop over distributions, errors as data.

Not ``entry_points()`` and not pluggy's loader. ``importlib_metadata`` 8.7 to 9.0, once anything in
the process has imported it, raises for everybody when one unrelated distribution has a malformed
entry point, and pluggy stops at the first plugin that does not import. Here every distribution and
every entry point fails alone. ``entry_points.txt`` is read as text, so that one malformed line
does not hide its neighbours, and METADATA only of distributions that have our group: parsing that
of a hundred distributions takes 0.1 s and more.
"""

from __future__ import annotations

import importlib
import site
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import importlib_metadata

from torchweld.guard import attempt, one_line
from torchweld.plugins.requirements import missing_module_hint
from torchweld.spelling import canonical

GROUP = "torchweld"
"""The entry-point group of plugins."""

DISABLE = "TORCHWELD_DISABLE"
"""Environment variable: names that are switched off before they are imported."""

AUTOLOAD = "TORCHWELD_AUTOLOAD"
"""Environment variable: ``0`` leaves only what core itself offers."""


@dataclass(frozen=True)
class Found:
    """One entry point of our group, not imported yet.

    Attributes:
        value: ``"module"`` or ``"module:object"``.
        location: directory that the distribution was found in.
        requires: the requirements in its own metadata.
    """

    entry_point: str
    value: str
    distribution: str
    version: str
    location: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Broken:
    """What is installed and cannot be used, as data.

    Attributes:
        entry_point: its name, or ``""`` when a whole distribution cannot be read.
        distribution: its name, as far as it can be read.
        location: directory that it was found in.
        error: what is wrong, one line.
        hint: what to do, one line; may be empty.
        component: the one concerned, or ``""`` when it is the whole plugin.
    """

    entry_point: str
    distribution: str
    version: str
    location: str
    error: str
    hint: str = ""
    component: str = ""

    @property
    def label(self) -> str:
        """The best name there is for it."""
        return self.distribution or self.entry_point or self.location


@dataclass(frozen=True)
class Discovery:
    """What is installed, nothing of it imported; everything sorted.

    Attributes:
        found: entry points to load.
        broken: distributions that cannot be read.
        disabled: entry points that ``TORCHWELD_DISABLE`` keeps from being imported.
        shadowed: further copies of a distribution, which Python would not import either.
    """

    found: tuple[Found, ...] = ()
    broken: tuple[Broken, ...] = ()
    disabled: tuple[Found, ...] = ()
    shadowed: tuple[Found, ...] = ()


def autoload(environ: Mapping[str, str]) -> bool:
    """Whether installed plugins take part at all."""
    return environ.get(AUTOLOAD, "").strip().lower() not in {"0", "false", "no", "off"}


def disabled_names(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The names in ``TORCHWELD_DISABLE``, as they were written."""
    names = (name.strip() for name in environ.get(DISABLE, "").split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def discover(environ: Mapping[str, str]) -> Discovery:
    """Find the entry points of the group ``torchweld``; nothing of a plugin is imported."""
    if not autoload(environ):
        return Discovery()
    found, broken = _scan(_distributions())
    first, shadowed = _first_copies(found)
    off = {canonical(name) for name in disabled_names(environ)}
    return Discovery(
        found=_sorted(f for f in first if not names_of(f) & off),
        broken=tuple(sorted(broken, key=lambda b: (b.label, b.location, b.error))),
        disabled=_sorted(f for f in first if names_of(f) & off),
        shadowed=_sorted(shadowed),
    )


def names_of(found: Found | Broken) -> set[str]:
    """The names that switch a plugin off before it is imported, in PEP 503 form."""
    return {canonical(name) for name in (found.entry_point, found.distribution) if name}


def load(found: Found) -> tuple[Any, Broken | None]:
    """Import what an entry point names; what goes wrong is returned, never raised."""
    module, _, attributes = found.value.partition(":")
    if not _is_reference(module, attributes):
        return None, _broken(found, f"malformed entry point {found.value!r}: not module:object")
    loaded = attempt(_import, module, attributes)
    if loaded.error is not None:
        return None, _broken(found, one_line(loaded.error), _hint(found, loaded.error))
    return loaded.value, None


def switch_off_hint(entry_point: str) -> str:
    """Say how to switch a plugin off."""
    return f"to switch it off: {DISABLE}={entry_point}" if entry_point else ""


def outside_site_packages(location: str) -> bool:
    """Whether a plugin was found where no installer puts one, such as the working directory."""
    if not location:
        return False
    usual = [*site.getsitepackages(), site.getusersitepackages()]
    usual += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return Path(location).resolve() not in {Path(directory).resolve() for directory in usual}


def _distributions() -> Iterator[Any]:
    """Yield distributions in the order of ``sys.path``; a finder that raises ends the loop."""
    every = _every_distribution()
    while True:
        following = attempt(next, every, None)
        if following.error is not None:
            yield following.error
        if following.value is None:
            return
        yield following.value


def _every_distribution() -> Iterator[Any]:
    yield from importlib_metadata.distributions()


def _scan(distributions: Iterable[Any]) -> tuple[list[Found], list[Broken]]:
    found: list[Found] = []
    unreadable: list[Broken] = []
    for distribution in distributions:
        if isinstance(distribution, BaseException):
            unreadable.append(Broken("", "", "", "sys.meta_path", one_line(distribution)))
            continue
        text = attempt(lambda d: d.read_text("entry_points.txt"), distribution)
        if text.error is not None:
            unreadable.append(
                _unreadable(distribution, f"entry_points.txt: {one_line(text.error)}")
            )
        elif isinstance(text.value, str) and GROUP in text.value:
            _read(distribution, _entries(text.value), found, unreadable)
    return found, unreadable


def _read(
    distribution: Any, entries: list[tuple[str, str]], found: list[Found], unreadable: list[Broken]
) -> None:
    """Add the entries of one distribution, or the reason why its metadata cannot be read."""
    if not entries:
        return
    described = attempt(_describe, distribution)
    if described.value is None:
        reason = one_line(described.error) if described.error else "it names no distribution"
        error = f"METADATA cannot be read: {reason}"
        unreadable += [_unreadable(distribution, error, entry_point=key) for key, _ in entries]
        return
    name, version, requires = described.value
    where = _location(distribution)
    found += [Found(key, value, name, version, where, requires) for key, value in entries]


def _entries(text: str) -> list[tuple[str, str]]:
    """Return (name, value) of every line in our section of an ``entry_points.txt``."""
    section, entries = "", []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section == GROUP and line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            # Extras after the reference, "module:object [extra]", have meant nothing since 2022.
            entries.append((name.strip(), value.partition("[")[0].strip()))
    return entries


def _describe(distribution: Any) -> tuple[str, str, tuple[str, ...]] | None:
    """Return name, version and requirements from METADATA, which is parsed once."""
    metadata = distribution.metadata
    name = metadata["Name"]
    if not name:
        return None
    requires = metadata.get_all("Requires-Dist") or ()
    return str(name), str(metadata["Version"] or ""), tuple(str(text) for text in requires)


def _unreadable(distribution: Any, error: str, entry_point: str = "") -> Broken:
    """A distribution that cannot be read, named by its directory as nothing else is known."""
    folder = Path(str(getattr(distribution, "_path", ""))).name
    name, _, version = folder.rpartition(".")[0].partition("-")
    hint = f"a damaged or half-removed installation ({folder}): install it again or delete it"
    return Broken(entry_point, name, version, _location(distribution), error, hint)


def _location(distribution: Any) -> str:
    where = attempt(lambda: str(Path(str(distribution.locate_file(""))).resolve()))
    return where.value or ""


def _first_copies(found: Iterable[Found]) -> tuple[list[Found], list[Found]]:
    """Part the copies of a distribution that Python imports from those behind them on the path."""
    copies: dict[str, list[tuple[str, str]]] = {}
    every = list(found)
    for entry in every:
        copy = (entry.location, entry.version)
        known = copies.setdefault(canonical(entry.distribution), [])
        if copy not in known:
            known.append(copy)
    chosen = {name: _chosen_copy(known) for name, known in copies.items()}
    first = [f for f in every if (f.location, f.version) == chosen[canonical(f.distribution)]]
    unique = list(dict.fromkeys(first))  # one directory may be on the path twice
    return unique, [f for f in every if f not in unique]


def _chosen_copy(copies: list[tuple[str, str]]) -> tuple[str, str]:
    """First on the path; of two in one directory the higher version, never the listing order."""
    directory = copies[0][0]
    return max((c for c in copies if c[0] == directory), key=lambda copy: _version_key(copy[1]))


def _version_key(version: str) -> tuple[list[int], str]:
    numbers = [int(part) for part in version.split(".") if part.isdigit()]
    return numbers, version


def _sorted(found: Iterable[Found]) -> tuple[Found, ...]:
    key: Callable[[Found], tuple[str, ...]] = lambda f: (  # noqa: E731
        canonical(f.distribution),
        f.entry_point,
        f.value,
        f.location,
    )
    return tuple(sorted(found, key=key))


def _is_reference(module: str, attributes: str) -> bool:
    parts = module.split(".") + (attributes.split(".") if attributes else [])
    return all(part.strip().isidentifier() for part in parts)


def _broken(found: Found, error: str, hint: str = "") -> Broken:
    off = switch_off_hint(found.entry_point)
    where = (found.entry_point, found.distribution, found.version, found.location)
    return Broken(*where, error, f"{hint}; {off}" if hint else off)


def _import(module: str, attributes: str) -> Any:
    value: Any = importlib.import_module(module.strip())
    for attribute in attributes.split(".") if attributes else ():
        value = getattr(value, attribute.strip())
    return value


def _hint(found: Found, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return missing_module_hint(error.name, found.requires)
    if isinstance(error, SystemExit):
        return "it leaves the process while it is imported"
    return ""

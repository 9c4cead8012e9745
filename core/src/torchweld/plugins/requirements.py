"""Requirements of plugins against what is installed, from metadata only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement

from torchweld.guard import attempt
from torchweld.spelling import canonical


@dataclass(frozen=True)
class Need:
    """One requirement and what is there.

    Attributes:
        requirement: its PEP 508 text.
        name: of the distribution it asks for.
        installed: its version, or ``""``.
        met: whether the installed version will do, or the requirement is not for this machine.
    """

    requirement: str
    name: str
    installed: str
    met: bool

    @property
    def finding(self) -> str:
        """``"torch>=2.9, installed is 2.7.0"``: for a message about an unmet one."""
        state = f"installed is {self.installed}" if self.installed else "which is not installed"
        return f"{self.requirement}, {state}"


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution, or ``""``."""
    # A leftover directory without METADATA raises whatever the importlib_metadata at hand likes.
    found = attempt(importlib_metadata.version, distribution)
    return found.value if isinstance(found.value, str) else ""


def needs(requirements: Iterable[str]) -> tuple[Need, ...]:
    """Compare PEP 508 requirements with what is installed.

    Requirements of extras and for other platforms are left out.

    Raises:
        InvalidRequirement: a text is no PEP 508 requirement.
    """
    parsed = [Requirement(text) for text in requirements]
    here = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return tuple(_need(requirement) for requirement in here)


def compare(wanted: Iterable[Sequence[str]]) -> dict[tuple[str, ...], tuple[Need, ...]]:
    """Compare several lists of requirements, each distinct one once.

    Reading a version parses the METADATA of its distribution, 5 ms for a long one, and the
    components of one plugin all need the same. Not remembered longer: a notebook may install
    what was missing and ask again.
    """
    return {needed: needs(needed) for needed in {tuple(requirements) for requirements in wanted}}


def malformed(requirements: Iterable[str]) -> tuple[str, ...]:
    """Return those texts that are no PEP 508 requirement."""
    return tuple(text for text in requirements if not _parses(text))


def missing_module_hint(module: str, requirements: Iterable[str]) -> str:
    """Say which requirement of a plugin's own metadata would bring a missing module.

    Never a name made from ``module``: whoever registers that name would be installed.

    Args:
        module: what could not be imported.
        requirements: the plugin's own, from its metadata.
    """
    top = canonical(module.partition(".")[0])
    unmet = [need for need in needs(r for r in requirements if _parses(r)) if not need.met]
    # A module may be called otherwise than its distribution; then every unmet one is a candidate.
    named = [need for need in unmet if canonical(need.name) == top] or unmet
    if not named:
        return f"its metadata asks for nothing that would bring {module!r}"
    return "its metadata asks for " + "; ".join(need.finding for need in named)


def _need(requirement: Requirement) -> Need:
    found = installed_version(requirement.name)
    # Vendors ship pre-releases of torch (2.8.0a0+...), which a plain specifier would refuse.
    met = bool(found) and requirement.specifier.contains(found, prereleases=True)
    return Need(str(requirement), requirement.name, found, met)


def _parses(text: str) -> bool:
    try:
        Requirement(text)
    except (InvalidRequirement, TypeError):
        return False
    return True

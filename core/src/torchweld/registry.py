"""What can be chosen: the components of built-ins and installed plugins, looked up by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchweld.claims import Claims, Phase
from torchweld.components import Choice, Chosen, Settings
from torchweld.guard import attempt
from torchweld.plugins.choosing import choose, usable
from torchweld.plugins.discovery import Broken, switch_off_hint
from torchweld.plugins.inventory import Inventory, stock_of, take_stock
from torchweld.plugins.offers import Offered, Plugin, items_of
from torchweld.plugins.options import build_options
from torchweld.problems import Problem

if TYPE_CHECKING:
    from torchweld.interfaces import RunFacts
    from torchweld.plan import Plan


class Registry:
    """The components that can be chosen, and what is wrong with those that cannot.

    An ordinary object; two may live side by side. ``Registry.installed()`` looks at this
    environment, ``Registry([plugin])`` discovers nothing and is for tests.

    Attributes:
        stock: everything that was found, as data.
    """

    def __init__(
        self, plugins: Mapping[str, object] | Sequence[object] = (), *, builtins: bool = True
    ) -> None:
        """Offer what ``plugins`` offer; nothing is discovered.

        Args:
            plugins: modules or instances with hooks; the keys of a mapping are the names by which
                they would be known as entry points.
            builtins: whether core's own components can be chosen.
        """
        self.stock: Inventory = stock_of(plugins, builtins=builtins)

    @classmethod
    def installed(cls, environ: Mapping[str, str] | None = None) -> Registry:
        """Offer what is installed in this environment.

        Args:
            environ: where the kill switches are read from; None: the environment of this process.
        """
        registry = cls(builtins=False)
        registry.stock = take_stock(os.environ if environ is None else environ)
        return registry

    @property
    def broken(self) -> tuple[Broken, ...]:
        """What is installed and faulty, sorted."""
        return self.stock.broken

    @property
    def notices(self) -> tuple[Problem, ...]:
        """Warnings about the kill switches, which become part of every plan."""
        return self.stock.notices

    def components(self, phase: Phase) -> tuple[Offered, ...]:
        """The components of a phase, by name and distribution."""
        return tuple(item for item in self.stock.offered if item.phase == phase)

    def choose(
        self, choice: Choice, phase: Phase, *, split: str = "", position: int | None = None
    ) -> tuple[Chosen | None, list[Problem]]:
        """Find what ``choice`` means in ``phase`` and give it its options.

        Args:
            choice: a name, a ``Use``, a ``Component``, an object that a plugin adopts, or for a
                surgery a function of ``Parts`` or an object with such an ``apply``.
            phase: the argument that it was given for.
            split: ``"val"`` for the data source of the other splits.
            position: place in the user's list; kept for functions, which have no other order.

        Returns:
            What was chosen, also when something is wrong with it, so that the rest of a plan can
            be checked; None when nothing can be made of it. And the problems.
        """
        return choose(self.stock, choice, phase, split=split, position=position)

    def offered(self, settings: Settings) -> tuple[Chosen, ...]:
        """Every usable component with its default options, from which fixes are suggested."""
        chosen = [
            Chosen(item.phase, item.component, options, item.origin)
            for item in usable(self.stock)
            for options in _defaults(item)
        ]
        return tuple(c for c in chosen if _has_claims(c, settings))

    def check_plan(self, plan: Plan, facts: RunFacts) -> list[Problem]:
        """Ask the plugins that take part in ``plan`` for what only this run's numbers can show."""
        taking_part = {chosen.origin for chosen in plan.order}
        problems: list[Problem] = []
        for plugin in self.stock.plugins:
            if plugin.origin in taking_part:
                problems += _run_checks(plugin, plan, facts)
        return problems

    def commands(self) -> Mapping[str, Sequence[Any]]:
        """Sub-commands of the plugins, by entry-point name."""
        return self.gather_commands()[0]

    def gather_commands(self) -> tuple[Mapping[str, Sequence[Any]], tuple[Broken, ...]]:
        """Return the sub-commands, and the plugins whose commands cannot be had."""
        commands: dict[str, Sequence[Any]] = {}
        broken: list[Broken] = []
        for plugin in self.stock.plugins:
            hook = plugin.hooks.get("torchweld_commands")
            if hook is None:
                continue
            items, fault = items_of("torchweld_commands", hook)
            if not fault and plugin.entry_point in commands:
                fault = f"another distribution has commands under {plugin.entry_point!r} already"
            if fault:
                broken.append(_broken(plugin, fault))
            else:
                commands[plugin.entry_point] = items
        return commands, tuple(broken)

    def gather_advice(self) -> tuple[Mapping[str, Sequence[str]], tuple[Broken, ...]]:
        """Return what plugins say this machine lacks, by entry point, and those that cannot say."""
        advice: dict[str, Sequence[str]] = {}
        broken: list[Broken] = []
        for plugin in self.stock.plugins:
            hook = plugin.hooks.get("torchweld_doctor")
            if hook is None:
                continue
            items, fault = items_of("torchweld_doctor", hook)
            if not fault and not all(isinstance(item, str) for item in items):
                fault = "torchweld_doctor returned something else than lines of text"
            if fault:
                broken.append(_broken(plugin, fault))
            elif items:
                advice[plugin.entry_point] = items
        return advice, tuple(broken)


def _defaults(item: Offered) -> Iterable[Any]:
    """Yield the default options of a component, unless an option has no default."""
    options, problems = build_options(item.component.name, item.component.options, {})
    if not problems:
        yield options


def _has_claims(chosen: Chosen, settings: Settings) -> bool:
    return isinstance(attempt(chosen.claims, settings).value, Claims)


def _run_checks(plugin: Plugin, plan: Plan, facts: RunFacts) -> list[Problem]:
    hook = plugin.hooks.get("torchweld_check_plan")
    if hook is None:
        return []
    items, fault = items_of("torchweld_check_plan", hook, plan=plan, facts=facts)
    if not fault and not all(isinstance(item, Problem) for item in items):
        fault = "torchweld_check_plan returned something else than Problems"
    if not fault:
        return items
    who = plugin.origin.distribution
    what = f"the run checks of {who} cannot be made"
    return [Problem("TW105", "error", what, fault, who=(who,))]


def _broken(plugin: Plugin, error: str) -> Broken:
    where, name = plugin.origin, plugin.entry_point
    hint = switch_off_hint(name)
    return Broken(name, where.distribution, where.version, where.location, error, hint)

"""A registry for tests: built-ins and what is given, whatever else is installed."""

from __future__ import annotations

from collections.abc import Sequence

from torchweld.components import Component
from torchweld.hookspecs import hookimpl
from torchweld.registry import Registry


def empty_registry(
    *plugins: object,
    strategies: Sequence[Component] = (),
    data_sources: Sequence[Component] = (),
    surgeries: Sequence[Component] = (),
) -> Registry:
    """Return a registry that discovers nothing.

    Args:
        plugins: modules or objects with hook implementations.
        strategies: components to offer beside them, without a plugin of their own.
        data_sources: likewise.
        surgeries: likewise.
    """
    given = _Given(strategies, data_sources, surgeries)
    return Registry([*plugins, given] if given else list(plugins))


class _Given:
    """A plugin that offers the components it was made with."""

    __name__ = "given"

    def __init__(self, *components: Sequence[Component]) -> None:
        self._components = components

    def __bool__(self) -> bool:
        return any(self._components)

    @hookimpl
    def torchweld_strategies(self) -> Sequence[Component]:
        return self._components[0]

    @hookimpl
    def torchweld_data_sources(self) -> Sequence[Component]:
        return self._components[1]

    @hookimpl
    def torchweld_surgeries(self) -> Sequence[Component]:
        return self._components[2]

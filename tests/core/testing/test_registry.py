"""empty_registry: what it offers, and what it does not look for."""

from __future__ import annotations

from torchweld import hookimpl
from torchweld.components import Component
from torchweld.testing import empty_registry


class Plugin:
    @hookimpl
    def torchweld_surgeries(self) -> list[Component]:
        return [Component("from_plugin", "", "nowhere:build")]


def test_an_empty_registry_offers_the_built_ins_only() -> None:
    registry = empty_registry()

    assert [o.component.name for o in registry.components("strategy")] == ["ddp", "single"]
    assert [o.component.name for o in registry.components("data")] == ["torch"]
    assert registry.components("surgery") == ()


def test_an_empty_registry_offers_what_it_is_given() -> None:
    surgery, source = (Component("given", "", f"nowhere:{build}") for build in ("one", "two"))

    registry = empty_registry(Plugin(), surgeries=[surgery], data_sources=[source])

    names = [offered.component.name for offered in registry.components("surgery")]
    assert names == ["from_plugin", "given"]
    assert [o.component.name for o in registry.components("data")] == ["given", "torch"]

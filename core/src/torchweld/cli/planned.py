"""From the words of ``torchweld plan`` to a plan."""

from __future__ import annotations

from collections.abc import Sequence

from torchweld.cli.choices import read_words
from torchweld.errors import InvalidArgument
from torchweld.plan import Plan
from torchweld.planning import auto_strategy, make_plan
from torchweld.registry import Registry


def plan_of_words(
    registry: Registry,
    words: Sequence[str],
    *,
    world_size: int | None,
    allow: Sequence[str],
    strict: bool,
) -> Plan:
    """Read ``words`` and plan; without a strategy or data source, take those of ``Trainer``.

    Raises:
        InvalidArgument: the words do not fit the grammar.
    """
    asked = read_words(words)
    if len(asked.val_data) > 1:
        raise InvalidArgument(f"val_data takes one data source, got {len(asked.val_data)}")
    return make_plan(
        registry,
        strategy=asked.strategy or auto_strategy(world_size or 1),
        data=asked.data or "torch",
        val_data=asked.val_data[0] if asked.val_data else None,
        surgery=asked.surgery,
        settings=asked.settings,
        facts=None if world_size is None else {"world>1": world_size > 1},
        allow=allow,
        strict=strict,
    )

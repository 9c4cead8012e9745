"""From a user's choices to a plan: look everything up, then resolve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TypeVar, cast

from torchweld.claims import Phase
from torchweld.components import Choice, Chosen, Settings
from torchweld.errors import InvalidArgument
from torchweld.plan import Plan
from torchweld.plugins.options import build_options
from torchweld.problems import Problem
from torchweld.registry import Registry
from torchweld.resolve import resolve

T = TypeVar("T")


def make_plan(
    registry: Registry,
    *,
    strategy: Choice | Sequence[Choice],
    data: Choice | Sequence[Choice],
    val_data: Choice | None = None,
    surgery: Choice | Sequence[Choice] = (),
    settings: Settings = Settings(),  # noqa: B008  # a frozen record
    facts: Mapping[str, bool] | None = None,
    allow: Sequence[str] = (),
    strict: bool = False,
) -> Plan:
    """Look up the choices and resolve them; never raises on what it finds.

    Args:
        registry: what can be chosen.
        strategy: one choice; of several the plan says why they exclude each other.
        data: the data source of training, and of the other splits unless ``val_data`` is given.
        val_data: the data source of the other splits.
        surgery: choices in any order.
        settings: what core settles.
        facts: run and fit tokens as far as they are known.
        allow: keys of findings that the user accepts, e.g. ``"TW302:cutmix+mixup"``.
        strict: warnings become errors.
    """
    chosen: list[Chosen] = []
    problems: list[Problem] = list(registry.notices)
    wanted: list[tuple[Phase, str, Iterable[Choice]]] = [
        ("strategy", "", _several(strategy)),
        ("data", "", _several(data)),
        ("data", "val", () if val_data is None else (val_data,)),
        ("surgery", "", _several(surgery)),
    ]
    for phase, split, choices in wanted:
        for position, choice in enumerate(choices):
            one, found = registry.choose(choice, phase, split=split, position=position)
            chosen += [] if one is None else [one]
            problems += found
    return resolve(
        chosen,
        settings,
        facts=facts,
        problems=problems,
        allow=allow,
        strict=strict,
        offered=registry.offered(settings),
    )


def per_unit(setting: str, options: type[T], value: object) -> T | None:
    """Read ``compile=`` and ``activation_checkpointing=``: off, on, or on with options.

    Args:
        setting: its name, for the message.
        options: the record of its options.
        value: False or None, True, a mapping, or a record.

    Raises:
        InvalidArgument: something else, or an option that does not exist or fit.
    """
    if value is None or value is False or isinstance(value, options):
        return value or None
    if value is not True and not isinstance(value, Mapping):
        names = ", ".join(field.name for field in fields(options))  # type: ignore[arg-type]  # a dataclass
        raise InvalidArgument(
            f"{setting}={value!r}: give True, False, or a mapping of its options ({names})"
        )
    made, problems = build_options(setting, options, {} if value is True else value)
    if problems:
        said = (": ".join(filter(None, [p.what, p.why, p.fix])) for p in problems)
        raise InvalidArgument("; ".join(said))
    return cast("T", made)


def auto_strategy(world_size: int) -> str:
    """Return the strategy that ``"auto"`` means: ``ddp`` for several processes, else ``single``."""
    return "ddp" if world_size > 1 else "single"


def _several(choices: Choice | Sequence[Choice]) -> tuple[Choice, ...]:
    """Return one choice or a list of them as a tuple; a name is one choice, not its letters."""
    return tuple(choices) if isinstance(choices, (list, tuple)) else (choices,)

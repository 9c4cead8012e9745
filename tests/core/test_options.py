from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import numpy as np
import pytest

from torchweld.plugins.options import build_options, expand_preset, option_rows

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass(frozen=True)
class Options:
    rate: float = 0.1
    count: int = 1
    on: bool = False
    kind: Literal["row", "col"] = "row"
    limit: int | None = None
    size: tuple[int, int] = (1, 1)
    names: tuple[str, ...] = ()
    price: Decimal | None = None  # only type checkers can resolve this one

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be >= 0, got {self.rate}")


@dataclass(frozen=True)
class OldStyle:
    either: Union[int, str] = 0
    perhaps: Optional[float] = None
    many: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Needed:
    path: str


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("rate", 1, 1.0),
        ("rate", np.float32(0.5), 0.5),
        ("count", np.int64(3), 3),
        ("limit", None, None),
        ("limit", 3, 3),
        ("size", [2, 3], (2, 3)),
        ("names", ["a", "b"], ("a", "b")),
        ("kind", "col", "col"),
        ("price", "not checked", "not checked"),
    ],
)
def test_an_option_is_taken_in_its_annotated_type(name: str, given: object, taken: object) -> None:
    options, problems = build_options("cutmix", Options, {name: given})

    assert problems == []
    assert getattr(options, name) == taken
    assert type(getattr(options, name)) is type(taken)


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("rate", "high", "rate is float, not str"),
        ("rate", True, "rate is float, not bool"),
        ("count", 1.5, "count is int, not float"),
        ("count", True, "count is int, not bool"),
        ("on", 1, "on is bool, not int"),
        ("kind", "diagonal", "kind is 'row' or 'col'"),
        ("limit", "3", "limit is int or None, not str"),
        ("size", (1, 2, 3), "size is tuple[int, int], not tuple"),
        ("names", "ab", "names is tuple[str, ...], not str"),
    ],
)
def test_an_option_of_another_type_is_named_with_its_value(
    name: str, given: object, why: str
) -> None:
    options, problems = build_options("cutmix", Options, {name: given})

    (problem,) = problems
    assert options == Options()
    assert (problem.code, problem.who) == ("TW103", ("cutmix",))
    assert problem.what == f"cutmix cannot take {name}={given!r}"
    assert problem.why == why


@pytest.mark.parametrize("given", [{"either": "a"}, {"either": 1}, {"perhaps": 1}, {"many": [1]}])
def test_older_spellings_of_annotations_are_understood(given: dict[str, Any]) -> None:
    assert build_options("x", OldStyle, given)[1] == []


def test_an_unknown_option_lists_the_known_ones_and_suggests_one() -> None:
    _, problems = build_options("cutmix", Options, {"rat": 0.5})

    (problem,) = problems
    assert problem.what == "cutmix has no option 'rat'"
    assert problem.why.startswith("its options: rate, count, on")
    assert problem.fix == "did you mean 'rate'?"


def test_the_other_options_are_kept_when_one_is_wrong() -> None:
    options, problems = build_options("cutmix", Options, {"rat": 0.5, "count": 4, "on": "yes"})

    assert options == Options(count=4)
    assert len(problems) == 2


def test_a_range_check_of_the_dataclass_becomes_a_problem_with_its_text() -> None:
    options, problems = build_options("cutmix", Options, {"rate": -1})

    (problem,) = problems
    assert options == Options()
    assert problem.code == "TW103"
    assert problem.why == "rate must be >= 0, got -1.0"


def test_a_missing_option_without_default_is_named() -> None:
    options, problems = build_options("ffcv", Needed, {})

    assert options is None
    assert [p.what for p in problems] == ["ffcv needs its option 'path'"]


def test_options_for_a_component_without_options_are_a_problem() -> None:
    _, problems = build_options("single", None, {"stage": 3})

    assert [p.what for p in problems] == ["single has no option 'stage'"]


def test_an_option_of_the_user_wins_over_the_preset() -> None:
    presets = {"stage_3": {"stage": 3, "offload": True}}

    assert expand_preset(presets, "stage_3", {"stage": 2}) == {"stage": 2, "offload": True}


def test_rows_say_type_and_default() -> None:
    rows = option_rows(Options)

    assert rows[0] == ("rate", "float", "0.1")
    assert rows[4] == ("limit", "int or None", "None")

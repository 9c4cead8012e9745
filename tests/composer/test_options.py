from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

import pytest

import torchweld_composer
from tests.composer.small_nets import algorithm
from torchweld import use
from torchweld.planning import make_plan
from torchweld.registry import Registry
from torchweld_composer.options import (
    BlurPoolOptions,
    ChannelsLastOptions,
    CutMixOptions,
    LabelSmoothingOptions,
)

REGISTRY = Registry({"composer": torchweld_composer})

WRAPPED = {
    "BlurPool": BlurPoolOptions,
    "CutMix": CutMixOptions,
    "LabelSmoothing": LabelSmoothingOptions,
}


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_options_have_the_names_and_defaults_of_composer(name: str) -> None:
    parameters = inspect.signature(type(algorithm(name))).parameters
    theirs = {n: p.default for n, p in parameters.items() if not n.endswith("_key")}

    ours = {field.name: field.default for field in fields(WRAPPED[name])}

    assert ours == theirs


def test_channels_last_converts_weights_by_default_as_composer_does() -> None:
    assert ChannelsLastOptions() == ChannelsLastOptions(weights=True)


BAD = [
    (BlurPoolOptions, {"min_channels": 0}, "min_channels=0 is not an integer >= 1"),
    (BlurPoolOptions, {"min_channels": 1.5}, "min_channels=1.5 is not an integer >= 1"),
    (BlurPoolOptions, {"replace_convs": False, "replace_maxpools": False}, "nothing to replace"),
    (CutMixOptions, {"alpha": 0}, "alpha=0 is not a finite number > 0"),
    (CutMixOptions, {"alpha": -1.0}, "alpha=-1.0 is not a finite number > 0"),
    (CutMixOptions, {"alpha": float("inf")}, "alpha=inf is not a finite number > 0"),
    (CutMixOptions, {"alpha": float("nan")}, "alpha=nan is not a finite number > 0"),
    (CutMixOptions, {"alpha": True}, "alpha=True is not a finite number > 0"),
    (LabelSmoothingOptions, {"smoothing": 1.01}, "smoothing=1.01 is not a number in [0, 1]"),
    (LabelSmoothingOptions, {"smoothing": -0.1}, "smoothing=-0.1 is not a number in [0, 1]"),
    (LabelSmoothingOptions, {"smoothing": float("nan")}, "smoothing=nan is not a number"),
]


@pytest.mark.parametrize(("options", "values", "message"), BAD)
def test_a_value_outside_its_range_is_refused_with_the_range(
    options: Any, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        options(**values)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (use("cutmix", alpha=0.0), ("cutmix", "alpha=0.0", "> 0")),
        (use("label_smoothing", smoothing=2.0), ("label_smoothing", "smoothing=2.0", "[0, 1]")),
        (use("blurpool", min_channels=0), ("blurpool", "min_channels=0", ">= 1")),
        (use("cutmix", alfa=1.0), ("cutmix", "alfa", "did you mean 'alpha'")),
        (use("channels_last", weights="no"), ("channels_last", "weights")),
    ],
)
def test_a_bad_option_is_a_problem_of_the_plan(choice: Any, words: tuple[str, ...]) -> None:
    plan = make_plan(REGISTRY, strategy="single", data="torch", surgery=[choice])

    (problem,) = plan.problems
    assert problem.code == "TW103"
    text = f"{problem.what} {problem.why} {problem.fix}"
    assert [word for word in words if word not in text] == []

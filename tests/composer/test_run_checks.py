"""Arguments that Composer accepts, or refuses in the middle of a run."""

from __future__ import annotations

from typing import Any

import pytest

import torchweld_composer
from tests.composer.small_nets import algorithm
from torchweld.interfaces import RunFacts
from torchweld.planning import make_plan
from torchweld.registry import Registry

REGISTRY = Registry({"composer": torchweld_composer})
pytestmark = pytest.mark.filterwarnings("ignore:.*(resuming|resume|resumption).*")


def problems_of(obj: Any, **facts: int | None) -> list[Any]:
    plan = make_plan(REGISTRY, strategy="single", data="torch", surgery=[obj])
    numbers = {"batch_size": 8, "last_batch_size": 8, "steps_per_epoch": 10, "total_steps": 100}
    return REGISTRY.check_plan(plan, RunFacts(world_size=1, **{**numbers, **facts}))


BAD = [
    ("CutMix", {"alpha": -1.0}, "alpha=-1.0 is not a number > 0"),
    ("CutMix", {"alpha": 0.0}, "alpha=0.0 is not a number > 0"),
    ("MixUp", {"alpha": -0.1}, "alpha=-0.1 is not a number > 0"),
    ("LabelSmoothing", {"smoothing": 1.5}, "smoothing=1.5 is not a number in [0, 1]"),
    ("BlurPool", {"min_channels": 0}, "min_channels=0 is not an integer >= 1"),
    ("GhostBatchNorm", {"ghost_batch_size": 0}, "ghost_batch_size=0 is not an integer >= 1"),
    (
        "EMA",
        {"half_life": None, "smoothing": 1.5, "update_interval": "1ba"},
        "smoothing=1.5 is not",
    ),
    (
        "GradientClipping",
        {"clipping_type": "nrom", "clipping_threshold": 1.0},
        "clipping_type='nrom' is unknown",
    ),
    (
        "GradientClipping",
        {"clipping_type": "value", "clipping_threshold": -1.0},
        "clipping_threshold=-1.0 is not a number > 0",
    ),
    ("ProgressiveResizing", {"initial_scale": 0.0}, "initial_scale=0.0 is not a number in (0, 1]"),
    (
        "ProgressiveResizing",
        {"delay_fraction": 0.5, "finetune_fraction": 0.5},
        "leave no time to grow",
    ),
    ("SqueezeExcite", {"latent_channels": 0}, "latent_channels=0 is not a number > 0"),
    ("ColOut", {"p_row": 1.0}, "p_row=1.0 is not a number in [0, 1)"),
    ("LayerFreezing", {"freeze_start": 1.0}, "freeze_start=1.0 is not a number in [0, 1)"),
    ("SAM", {"interval": 0}, "interval=0 is not an integer >= 1"),
    ("CutOut", {"length": 0.0}, "length=0.0 is not a number > 0"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD)
def test_an_argument_outside_its_range_is_an_error_before_step_1(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    found = problems_of(algorithm(name, **arguments))

    assert any(message in problem.what for problem in found)
    assert all(problem.fix for problem in found)


def test_sound_arguments_are_no_problem() -> None:
    for name, arguments in (
        ("CutMix", {}),
        ("EMA", {"half_life": "5ba"}),
        ("GhostBatchNorm", {"ghost_batch_size": 8}),
        ("ProgressiveResizing", {}),
        ("LayerFreezing", {}),
        ("SAM", {}),
    ):
        assert problems_of(algorithm(name, **arguments)) == []


def test_a_batch_smaller_than_the_ghost_batch_is_an_error() -> None:
    (problem,) = problems_of(algorithm("GhostBatchNorm", ghost_batch_size=4), last_batch_size=3)

    assert problem.severity == "error"
    assert "a batch of 3 samples is smaller than ghost_batch_size=4" in problem.what


def test_a_half_life_over_a_tenth_of_the_run_is_a_warning() -> None:
    (problem,) = problems_of(algorithm("EMA", half_life="20ba"))

    assert problem.severity == "warning"
    assert "half_life='10ba'" in problem.fix


def test_gyro_dropout_that_does_not_fit_the_run_is_an_error() -> None:
    found = problems_of(algorithm("GyroDropout", sigma=256, tau=16))

    assert [p.severity for p in found] == ["error", "error"]
    assert "100 steps" in found[0].what
    assert "tau=16" in found[1].what


def test_a_warmup_that_does_not_fit_the_run_is_an_error() -> None:
    (problem,) = problems_of(algorithm("SeqLengthWarmup"))

    assert "do not fit" in problem.what


def test_unknown_numbers_are_no_problem() -> None:
    nothing = dict.fromkeys(("batch_size", "last_batch_size", "steps_per_epoch", "total_steps"))

    assert problems_of(algorithm("EMA", half_life="20ba"), **nothing) == []

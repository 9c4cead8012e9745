"""What the data source claims, each with the trouble that it prevents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchweld_ffcv
from tests.ffcv.reading import load, pictures, write
from torchweld import Claims, Component, Rel, Settings, use
from torchweld.components import CompileOptions
from torchweld.planning import make_plan
from torchweld.registry import Registry
from torchweld_ffcv import image

REGISTRY = Registry({"ffcv": torchweld_ffcv})
FACTS = {"world>1": False, "loss.accepts_soft_targets": False, "inputs.4d": True}
MIXER = Component(
    name="mixer",
    summary="a stranger that mixes samples, with Composer's claim",
    build=lambda: lambda parts: parts,
    claims=Claims(
        edits=("batch.inputs", "batch.targets"),
        forbids=Rel("targets.soft", "the second would mix samples that are mixed already"),
    ),
)


def plan_of(*surgery: Any, facts: Any = None, compiled: bool = False, **options: Any) -> Any:
    return make_plan(
        REGISTRY,
        strategy="single",
        data=use("ffcv", **{"batch_size": 4, **options}),
        surgery=surgery,
        settings=Settings(compile=CompileOptions() if compiled else None),
        facts={**FACTS, **(facts or {})},
    )


def found(plan: Any) -> list[tuple[str, str]]:
    return [(problem.code, problem.severity) for problem in plan.problems]


def named(name: str) -> Any:
    """An operation with the name of one of FFCV's; only the name is looked at."""
    return type(name, (), {})()


MIXUP = {"image": [named("ImageMixup")], "label": [named("LabelMixup"), named("MixupToOneHot")]}


def test_it_is_the_one_loader_of_its_split() -> None:
    assert plan_of().problems == ()


def test_ffcvs_mixup_and_a_mixer_are_not_both() -> None:
    soft = {"loss.accepts_soft_targets": True}

    assert found(plan_of(MIXER, pipelines=MIXUP, facts=soft)) == [("TW302", "error")]
    assert found(plan_of(MIXER, facts=soft)) == []
    assert found(plan_of(pipelines=MIXUP, facts=soft)) == []


def test_ffcvs_mixup_needs_a_loss_for_probabilities() -> None:
    assert found(plan_of(pipelines=MIXUP)) == [("TW301", "error")]
    with pytest.raises((RuntimeError, ValueError)):
        F.nll_loss(torch.zeros(4, 3), torch.full((4, 3), 1 / 3))


def test_a_compiled_model_is_better_off_without_a_smaller_last_batch() -> None:
    assert found(plan_of(compiled=True)) == [("TW302", "warning")]
    assert found(plan_of(compiled=True, drop_last=True)) == []


@pytest.mark.parametrize(("drop_last", "graphs"), [(False, 2), (True, 1)])
def test_a_smaller_last_batch_is_compiled_for_once_more(
    tmp_path: Path, drop_last: bool, graphs: int
) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    path = write(tmp_path / "small.beton", pictures(10))
    counter, net = CompileCounter(), nn.Conv2d(3, 2, 3)
    compiled: Any = torch.compile(net, backend=counter)

    for images, _ in load(path, batch_size=4, drop_last=drop_last):
        compiled(images)

    assert counter.frame_count == graphs


def test_the_plan_says_that_images_stay_uint8(tmp_path: Path) -> None:
    path = write(tmp_path / "small.beton", pictures(4))
    spec = {"image": image(normalize=None)}

    assert "images stay uint8" in plan_of(spec=spec).explain()
    assert "images stay uint8" not in plan_of(spec={"image": image()}).explain()
    images, _ = next(iter(load(path, batch_size=4, spec=spec)))
    with pytest.raises(RuntimeError, match=r"Byte|unsigned char"):
        nn.Conv2d(3, 2, 3)(images)


def test_the_plan_says_what_evaluation_does_differently() -> None:
    spec = {"image": image(crop="random_resized", size=8)}

    assert "evaluation cuts out the middle" in plan_of(spec=spec).explain()


def test_the_plan_says_that_pipelines_are_run_in_evaluation_too() -> None:
    assert "pipelines= are run in evaluation" in plan_of(pipelines={}).explain()
    assert "pipelines= are run in evaluation" not in plan_of().explain()


def test_who_needs_a_torch_dataloader_is_told_that_there_is_none() -> None:
    needy = Component(
        name="needy",
        summary="puts itself into a torch Dataset",
        build=lambda: lambda parts: parts,
        claims=Claims(edits="batch.inputs", requires=Rel("loader.torch", "it wraps the Dataset")),
    )

    assert found(plan_of(needy)) == [("TW301", "error")]


def test_equal_specs_and_pipelines_have_equal_digests() -> None:
    def plan() -> Any:
        spec = {"image": image(crop="random_resized", size=8)}
        return plan_of(spec=spec).digest, plan_of(pipelines={"image": [named("A")]}).digest

    assert plan() == plan()

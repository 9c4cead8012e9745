"""Algorithm objects as components: Composer's own by their class, a stranger's by its events."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchweld_composer
from tests.composer.small_nets import algorithm
from torchweld import use
from torchweld.planning import make_plan
from torchweld.registry import Registry
from torchweld_composer.adopt import adopted_component, is_algorithm, snake_case
from torchweld_composer.imports import composer_module
from torchweld_composer.known import KNOWN

Algorithm: Any = composer_module("composer.core").Algorithm
Event: Any = composer_module("composer.core").Event
REGISTRY = Registry({"composer": torchweld_composer})


def plan_of(*surgery: Any, strategy: str = "single") -> Any:
    return make_plan(REGISTRY, strategy=strategy, data="torch", surgery=surgery)


class HalveInputs(Algorithm):  # type: ignore[misc]  # a class of an untyped library
    """A stranger's algorithm, of one event."""

    def match(self, event: Any, state: Any) -> bool:
        return bool(event == Event.BEFORE_FORWARD)

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        state.batch_set_item(0, state.batch_get_item(0) / 2)


class LateClip(HalveInputs):
    """Begins to answer in the middle of the run."""

    def match(self, event: Any, state: Any) -> bool:
        return bool(event == Event.AFTER_TRAIN_BATCH and state.timestamp.epoch > 30)


class Everywhere(HalveInputs):
    """Answers events that a torchweld loop does not have."""

    def match(self, event: Any, state: Any) -> bool:
        return event in {Event.INIT, Event.EVAL_BATCH_END, Event.AFTER_BACKWARD}


class NeedsMore(HalveInputs):
    """Its match looks for something that is there in a run only."""

    def match(self, event: Any, state: Any) -> bool:
        return bool(event == Event.BATCH_END and state.model.head.weight.mean() > 0)


def test_the_hook_takes_algorithms_for_surgery_only() -> None:
    obj = algorithm("CutOut")

    assert torchweld_composer.torchweld_adopt(obj, "surgery") is not None
    assert torchweld_composer.torchweld_adopt(obj, "data") is None
    assert torchweld_composer.torchweld_adopt(nn.Linear(1, 1), "surgery") is None


def test_an_algorithm_is_recognised_by_the_names_of_its_classes() -> None:
    assert is_algorithm(algorithm("CutMix"))
    assert is_algorithm(HalveInputs())
    assert not is_algorithm("cutmix")
    assert not is_algorithm(algorithm)


def test_every_algorithm_of_composer_is_known() -> None:
    module = composer_module("composer.algorithms")
    classes = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Algorithm)
    }

    assert set(KNOWN) == classes


def test_an_object_of_the_four_has_the_claims_of_the_name() -> None:
    named = plan_of("blurpool", "channels_last", "cutmix", "label_smoothing")
    objects = [algorithm(n) for n in ("LabelSmoothing", "CutMix", "ChannelsLast", "BlurPool")]

    adopted = plan_of(*objects)

    assert [c.name for c in adopted.surgeries] == [c.name for c in named.surgeries]
    assert [e[:2] for e in adopted.edges] == [e[:2] for e in named.edges]
    assert adopted.problems == ()


def test_the_options_of_an_object_are_its_own() -> None:
    obj = algorithm("LabelSmoothing", smoothing=0.3)

    surgery = plan_of(obj).surgeries[0].make()

    assert surgery.algorithm is obj


def test_two_settings_of_an_object_are_two_plans() -> None:
    digests = [plan_of(algorithm("CutMix", alpha=alpha)).digest for alpha in (0.5, 0.5, 1.0)]

    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_the_object_itself_is_run() -> None:
    obj = algorithm("EMA", half_life="1ba")

    surgery = plan_of(obj).surgeries[0].make()

    assert surgery.algorithm is obj


@pytest.mark.parametrize(
    ("name", "snake"),
    [("ChannelsLast", "channels_last"), ("MyEMADecay", "my_ema_decay"), ("Prune2D", "prune2_d")],
)
def test_names_of_strangers_are_in_snake_case(name: str, snake: str) -> None:
    assert snake_case(name) == snake


def test_a_stranger_has_the_claims_of_its_events() -> None:
    claims: Any = adopted_component(HalveInputs()).claims

    assert claims.edits == ("batch.inputs", "batch.targets")
    assert claims.requires == ()


def test_a_stranger_that_begins_late_is_found_while_planning() -> None:
    claims: Any = adopted_component(LateClip()).claims

    assert claims.edits == ("grads",)
    assert {rel.target for rel in claims.requires} >= {"grads.whole", "grads.elementwise"}


def test_a_stranger_whose_match_cannot_be_asked_yet_may_answer_everything() -> None:
    component = adopted_component(NeedsMore())
    build: Any = component.build

    assert "BATCH_END" in build.events


def test_events_without_a_place_are_refused_by_name() -> None:
    plan = plan_of(Everywhere())

    errors = [p for p in plan.problems if p.severity == "error"]
    assert {p.code for p in errors} == {"TW301"}
    text = " ".join(p.why for p in errors)
    assert "AFTER_BACKWARD" in text
    assert "EVAL_BATCH_END" in text


def test_a_subclass_of_one_of_the_four_is_a_stranger() -> None:
    parent: Any = composer_module("composer.algorithms").CutMix

    class MyCutMix(parent):  # type: ignore[misc]  # a class of an untyped library
        pass

    assert adopted_component(MyCutMix()).name == "my_cut_mix"


def test_asking_a_stranger_does_not_change_it() -> None:
    class Counts(HalveInputs):
        asked = 0

        def match(self, event: Any, state: Any) -> bool:
            self.asked += 1
            return False

    obj = Counts()
    adopted_component(obj)

    assert obj.asked == 0


def test_after_reaches_an_object() -> None:
    plan = plan_of("label_smoothing", use(HalveInputs(), after="label_smoothing"))

    assert [c.name for c in plan.surgeries] == ["label_smoothing", "halve_inputs"]


def test_a_class_instead_of_an_object_is_an_error_with_the_fix() -> None:
    (problem,) = plan_of(HalveInputs).problems

    assert problem.code == "TW101"
    assert "give an instance" in problem.fix


def test_low_precision_layers_are_put_in_and_the_plan_says_when_they_act() -> None:
    plan = make_plan(
        REGISTRY,
        strategy="single",
        data="torch",
        surgery=[algorithm("LowPrecisionLayerNorm")],
        facts={"device.cuda": False},
    )
    warnings = [p.code for p in plan.problems if p.severity == "warning"]
    from torchweld.interfaces import Parts

    model = plan.surgeries[0].make().apply(Parts(nn.Sequential(nn.LayerNorm(3)))).model

    assert warnings == ["TW301", "TW301"]
    assert type(model[0]).__name__ == "LPLayerNorm"
    x = torch.randn(2, 3)
    assert torch.equal(model(x), nn.functional.layer_norm(x, (3,)))

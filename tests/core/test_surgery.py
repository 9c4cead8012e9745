"""A surgery may do what it claims; the difference is found, not believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core.trainings import (
    SGD_FACTORY,
    assert_same,
    fit,
    make_loader,
    make_model,
    make_net,
    train_by_hand,
)
from torchweld import Claims, Component, Parts, apply_surgery
from torchweld.errors import PluginError, SurgeryError
from torchweld.model.surgery import difference, snapshot
from torchweld.testing import empty_registry

Surgery = Callable[[Parts], Any]

SPEAKING = {
    "barebones": False,
    "enable_checkpointing": False,
    "logger": False,
    "enable_progress_bar": False,
}
"""Flags of a run that prints what is no warning, too."""


def change(surgery: Surgery, model: nn.Module | None = None, loss: Any = F.cross_entropy) -> Any:
    """What the difference says of one surgery."""
    parts = Parts(make_net() if model is None else model, loss)
    before = snapshot(parts)
    return difference(before, snapshot(surgery(parts)))


def component(surgery: Surgery, **claims: Any) -> Component:
    return Component("stranger", "for a test", lambda: surgery, claims=Claims(**claims))


def operated(surgery: Any, *, strict: bool = False, **claims: Any) -> nn.Sequential:
    """Train with one surgery that claims so much."""
    model = make_net()
    chosen = component(surgery, **claims) if claims else surgery
    fit(model, make_loader(), settings={"surgery": [chosen], "strict": strict})
    return model


def layers(parts: Parts) -> Any:
    """The model, a Sequential."""
    return parts.model


# ---- the difference ------------------------------------------------------------------------------


def replaces_a_layer(parts: Parts) -> Parts:
    layers(parts)[2] = nn.GELU()
    return parts


def wraps_the_model(parts: Parts) -> Parts:
    return dataclasses.replace(parts, model=nn.Sequential(parts.model))


def freezes(parts: Parts) -> Parts:
    next(parts.model.parameters()).requires_grad_(False)
    return parts


def fills_in_place(parts: Parts) -> Parts:
    nn.init.zeros_(next(parts.model.parameters()))
    return parts


def casts(parts: Parts) -> Parts:
    parts.model.double()
    return parts


def ties(parts: Parts) -> Parts:
    layers(parts)[1].weight = layers(parts)[1].bias
    return parts


def sets_an_attribute(parts: Parts) -> Parts:
    layers(parts)[3].p = 0.9
    return parts


def adds_a_hook(parts: Parts) -> Parts:
    layers(parts)[2].register_forward_hook(lambda module, inputs, outputs: outputs)
    return parts


def replaces_forward(parts: Parts) -> Parts:
    layers(parts)[2].forward = torch.tanh
    return parts


FOUND: dict[Surgery, tuple[set[str], str]] = {
    replaces_a_layer: ({"model"}, "1 ReLU -> GELU"),
    wraps_the_model: ({"model"}, "Sequential"),
    freezes: ({"model"}, "1 tensors frozen"),
    fills_in_place: ({"model"}, "1 tensors changed in place"),
    casts: ({"model"}, "tensors of another dtype"),
    ties: ({"model"}, "1 tensors replaced"),
    sets_an_attribute: ({"model"}, "1 modules with other attributes or hooks"),
    adds_a_hook: ({"model"}, "1 modules with other attributes or hooks"),
    replaces_forward: ({"model"}, "1 modules with other attributes or hooks"),
    lambda parts: dataclasses.replace(parts, loss=F.nll_loss): ({"loss"}, "loss"),
    lambda parts: dataclasses.replace(parts, after_step=(print,)): ({"after_step"}, "after step"),
    lambda parts: parts: (set(), "nothing"),
}


@pytest.mark.parametrize("surgery", FOUND, ids=lambda surgery: surgery.__name__)
def test_a_change_is_found_and_said(surgery: Surgery) -> None:
    fields, words = FOUND[surgery]

    found = change(surgery)

    assert found.fields == fields
    assert words in str(found)


def test_a_setting_of_a_loss_that_is_a_module_is_found() -> None:
    def smooths(parts: Parts) -> Parts:
        parts.loss.label_smoothing = 0.1  # type: ignore[union-attr]  # a CrossEntropyLoss
        return parts

    assert change(smooths, loss=nn.CrossEntropyLoss()).fields == {"loss"}


def test_using_the_model_changes_nothing() -> None:
    def looks(parts: Parts) -> Parts:
        with torch.no_grad():
            parts.model.eval()(torch.ones(2, 5))
        parts.model.train()
        return parts

    assert not change(looks, make_model())


# ---- against the claims --------------------------------------------------------------------------


def test_a_change_within_the_claims_is_trained() -> None:
    model = operated(replaces_a_layer, edits="model.modules")

    assert isinstance(model[2], nn.GELU)


@pytest.mark.parametrize(
    ("surgery", "claims", "slot"),
    [
        (replaces_a_layer, {"edits": "batch.inputs"}, "model.modules"),
        (adds_a_hook, {"edits": "batch.inputs"}, "model.modules"),
        (fills_in_place, {"edits": "loss.fn"}, "model.modules"),
        (lambda p: dataclasses.replace(p, loss=F.nll_loss), {"edits": ()}, "loss.fn"),
        (
            lambda p: dataclasses.replace(p, batch_transforms=(lambda b: b,)),
            {"edits": "model.modules"},
            "batch.inputs or batch.targets",
        ),
        (lambda p: dataclasses.replace(p, optimizer=SGD_FACTORY.func), {"edits": ()}, "optimizer"),
        (lambda p: dataclasses.replace(p, grad_transforms=(list,)), {"edits": ()}, "grads"),
    ],
    ids=["model", "hook", "weights", "loss", "batch", "optimizer", "gradients"],
)
def test_a_change_outside_the_claims_is_an_error(surgery: Any, claims: Any, slot: str) -> None:
    with pytest.raises(SurgeryError, match=rf"(?s)TW502  stranger changed .*the slot {slot}"):
        operated(surgery, **claims)


def test_a_function_of_the_users_own_is_told_how_to_claim_more() -> None:
    def other_loss(parts: Parts) -> Parts:
        return dataclasses.replace(parts, loss=lambda outputs, targets: outputs.mean())

    with pytest.raises(SurgeryError, match=r"claims=Claims\(edits=\['loss\.fn'\]\)"):
        operated(other_loss)


def test_a_surgery_that_changes_nothing_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    operated(lambda parts: parts, edits="model.modules")

    assert "warning: TW501 stranger changed nothing" in capsys.readouterr().out


def test_a_surgery_that_changes_nothing_is_an_error_under_strict() -> None:
    with pytest.raises(SurgeryError, match="TW501  stranger changed nothing"):
        operated(lambda parts: parts, strict=True, edits="model.modules")


@pytest.mark.parametrize("strict", [False, True])
def test_a_surgery_that_changes_nothing_can_be_allowed(
    strict: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = component(lambda parts: parts, edits="model.modules")
    settings = {"surgery": [chosen], "strict": strict, "allow": ["TW501:stranger"]}

    fit(make_net(), make_loader(), settings={**settings, **SPEAKING})

    output = capsys.readouterr().out
    assert "TW501 stranger changed nothing; you allowed it: TW501:stranger" in output
    assert "warning" not in output


def test_a_change_outside_the_claims_can_be_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"surgery": [component(replaces_a_layer, edits=())], "allow": ["TW502:stranger"]}
    model = make_net()

    fit(model, make_loader(), settings={**settings, **SPEAKING})

    assert isinstance(model[2], nn.GELU)
    assert "does not claim" in capsys.readouterr().out


@pytest.mark.parametrize("allow", [["TW502:other"], ["TW501:stranger"]])
def test_allowing_something_else_allows_nothing(allow: list[str]) -> None:
    settings = {"surgery": [component(replaces_a_layer, edits=())], "allow": allow}

    with pytest.raises(SurgeryError, match="TW502  stranger changed 'model'"):
        fit(make_net(), make_loader(), settings=settings)


def test_allowing_what_no_surgery_does_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"surgery": [component(replaces_a_layer)], "allow": ["TW501:strange"]}

    fit(make_net(), make_loader(), settings=settings)

    said = "warning: TW103 allow='TW501:strange' matches no finding"
    assert said in capsys.readouterr().out


def test_apply_surgery_takes_what_was_allowed_in_training() -> None:
    chosen = component(replaces_a_layer, edits=())

    model = apply_surgery(make_net(), [chosen], allow=["TW502:stranger"], registry=empty_registry())

    assert isinstance(layers(Parts(model))[2], nn.GELU)


def test_every_change_outside_the_claims_is_said_at_once() -> None:
    def both(parts: Parts) -> Parts:
        return dataclasses.replace(replaces_a_layer(parts), after_step=(print,))

    with pytest.raises(SurgeryError, match=r"(?s)'after_step'.*'model'"):
        operated(both, edits="batch.inputs")


# ---- surgeries that fail -------------------------------------------------------------------------


def raises(parts: Parts) -> Parts:
    raise KeyError("conv1")


@pytest.mark.parametrize(
    ("surgery", "words"),
    [
        (lambda parts: None, r"'stranger' returned NoneType, not Parts.*dataclasses\.replace"),
        (lambda parts: parts.model, "returned Sequential, not Parts"),
        (raises, r"surgery 'stranger' failed: KeyError\('conv1'\)"),
    ],
    ids=["None", "a model", "an error"],
)
def test_a_surgery_that_fails_is_named(surgery: Any, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        operated(surgery, edits="model.modules")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": None}, "model is a NoneType, not an nn.Module"),
        ({"batch_transforms": print}, "batch_transforms is .*, not a tuple of functions"),
        ({"target_transforms": [print]}, "target_transforms is .*, not a tuple"),
        ({"after_step": (3,)}, r"after_step is \(3,\), not a tuple of functions"),
    ],
    ids=["model", "a function", "a list", "a number"],
)
def test_parts_of_another_kind_are_named(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(PluginError, match=f"'stranger' made Parts of which {words}"):
        operated(lambda parts: dataclasses.replace(parts, **changed), edits="model.modules")


# ---- what was changed is trained -----------------------------------------------------------------


def test_parameters_made_by_a_surgery_are_trained() -> None:
    def new_head(parts: Parts) -> Parts:
        layers(parts)[2] = make_model()[2]
        return parts

    model = make_model()
    given = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    fit(model, make_loader(), optimizer=given, settings={"surgery": [new_head]})

    assert_same(model, train_by_hand(make_model(), [[b] for b in make_loader()]))


def test_transforms_act_where_they_belong() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str, value: Tensor) -> Tensor:
        seen.append((name, tuple(value.shape)))
        return value

    def transforms(parts: Parts) -> Parts:
        return dataclasses.replace(
            parts,
            sample_transforms=(lambda sample: (note("sample", sample[0]), sample[1]),),
            input_transforms=(lambda inputs: note("input", inputs),),
            batch_transforms=(lambda batch: (note("batch", batch[0]), batch[1]),),
            target_transforms=(lambda outputs, targets: note("target", targets),),
            grad_transforms=(lambda named: seen.append(("grads", (len(list(named)),))),),
            after_step=(lambda: seen.append(("after", ())),),
        )

    claims = {"edits": ["batch.inputs", "batch.targets", "grads", "optimizer"]}
    chosen = component(transforms, **claims)
    settings = {"surgery": [chosen], "max_steps": 1}
    fit(make_model(), make_loader(4), make_loader(13), settings=settings)

    training = [("input", (4, 5)), ("batch", (4, 5)), ("target", (4,)), ("grads", (4,))]
    evaluation = [("input", (n, 5)) for n in (4, 4, 4, 1)]
    assert seen[:4] == [("sample", (5,))] * 4
    assert seen[4] == ("input", (4, 5))  # the trial before step 1
    assert seen[5:] == [*training, ("after", ()), *evaluation]


def test_apply_surgery_makes_the_model_of_a_run() -> None:
    model: Any = apply_surgery(
        make_net(), component(replaces_a_layer, edits="model.modules"), registry=empty_registry()
    )

    assert isinstance(model[2], nn.GELU)

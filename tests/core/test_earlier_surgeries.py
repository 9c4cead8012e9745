"""No surgery is done twice to one model, however often it is trained or evaluated."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from tests.core.trainings import make_loader, make_net
from torchweld import Claims, Component, Parts, Trainer
from torchweld.errors import SurgeryError


def widens(parts: Parts) -> Parts:
    """One more layer each time: what would show twice."""
    model: Any = parts.model
    model.append(nn.Identity())
    return parts


def scales_the_loss(parts: Parts) -> Parts:
    """Changes no model: belongs to each run."""
    loss: Any = parts.loss
    return dataclasses.replace(parts, loss=lambda outputs, targets: 2 * loss(outputs, targets))


def both(parts: Parts) -> Parts:
    """Changes the model and the loss."""
    return scales_the_loss(widens(parts))


def wraps(parts: Parts) -> Parts:
    """Another module around it."""
    return dataclasses.replace(parts, model=nn.Sequential(parts.model))


def trainer(*surgeries: Callable[[Parts], Parts]) -> Trainer:
    """A Trainer with these surgeries, which claim all that they do."""
    claims = Claims(edits=("model.modules", "loss.fn"))
    chosen = [Component(s.__name__, "for a test", lambda s=s: s, claims=claims) for s in surgeries]
    return Trainer(surgery=chosen, barebones=True)


def fit(made: Trainer, model: Any, **more: Any) -> float:
    """Train for an epoch; returns the loss."""
    arguments = {"loss": F.cross_entropy, "optimizer": partial(SGD, lr=0.0), **more}
    return made.fit(model, make_loader(), **arguments).metrics["train_loss"]


def identities(model: nn.Module) -> int:
    """How often it was widened."""
    return sum(isinstance(module, nn.Identity) for module in model.modules())


def test_a_model_that_is_trained_again_is_not_operated_on_again() -> None:
    made, model = trainer(widens, scales_the_loss), make_net()

    first, second = fit(made, model), fit(made, model)

    assert identities(model) == 1
    assert second == pytest.approx(first, rel=0.1)  # dropout; unscaled it would be half


def test_a_model_that_was_trained_is_evaluated_as_it_is() -> None:
    made, model, other = trainer(widens), make_net(), make_net()
    fit(made, model)
    fit(made, other)  # the last one; the first is evaluated as a model that is given

    made.evaluate(model, make_loader(), loss=F.cross_entropy)

    assert (identities(model), identities(other)) == (1, 1)


def test_a_model_that_was_evaluated_is_trained_as_it_is() -> None:
    made, model = trainer(widens), make_net()
    made.evaluate(model, make_loader(), loss=F.cross_entropy)

    fit(made, model)

    assert identities(model) == 1


def test_what_was_done_before_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    made = Trainer(
        surgery=widens, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    model = make_net()
    fit(made, model)
    capsys.readouterr()

    fit(made, model)

    assert "widens: done to this model in an earlier run of this Trainer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        (both, r"'both' changed this model in an earlier run .* and also changed loss"),
        (wraps, r"'wraps' made another module of this model .* give a newly built model"),
    ],
)
def test_what_can_neither_be_left_out_nor_done_again_is_refused(
    surgery: Callable[[Parts], Parts], message: str
) -> None:
    made, model = trainer(surgery), make_net()
    fit(made, model)

    with pytest.raises(SurgeryError, match=message):
        fit(made, model)
    fit(made, make_net())  # a new model is one


def test_a_model_that_a_function_builds_is_operated_on_in_each_run() -> None:
    made, built = trainer(widens), []

    def build() -> nn.Module:
        built.append(make_net())
        return built[-1]

    fit(made, build)
    fit(made, build)

    assert [identities(model) for model in built] == [1, 1]


def test_each_of_several_models_is_remembered() -> None:
    made, pair = trainer(widens_each), {"a": make_net(), "b": make_net()}
    for _ in range(2):
        _train_both(made, pair)

    assert [identities(model) for model in pair.values()] == [1, 1]
    with pytest.raises(SurgeryError, match="still due for another one"):
        _train_both(made, {"a": pair["a"], "b": make_net()})


def widens_each(parts: Parts) -> Parts:
    """The same for every model."""
    for model in parts.model.children():
        model.append(nn.Identity())  # type: ignore[operator]  # Sequentials
    return parts


def _train_both(made: Trainer, pair: Mapping[str, nn.Module]) -> None:
    optimizers = dict.fromkeys(pair, partial(SGD, lr=0.1))
    with made.prepare(pair, make_loader(), loss=F.cross_entropy, optimizer=optimizers) as run:
        for inputs, targets in run.batches():
            for model in run.models.values():
                model.backward(run.loss(model(inputs), targets))
                model.step()


def test_a_model_that_is_gone_is_forgotten() -> None:
    made, model = trainer(widens), make_net()
    kept = weakref.ref(model)
    fit(made, model)
    fit(made, make_net())  # a Trainer keeps its last run

    del model
    gc.collect()

    assert kept() is None

"""What is logged by name is the mean over the samples, as ``train_loss`` is, however they end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD
from torch.utils.data import DataLoader

from tests.core.trainings import Stream, make_data, make_model, make_trainer, of_dataset
from torchweld import Trainer
from torchweld.testing import run_ranks

STILL = partial(SGD, lr=0.0)  # so that the mean over all samples is known
SAMPLES = {"no samples at the end": 9, "short batches at the end": 13, "even": 16}


def _twice(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(outputs, targets)
    return {"loss": loss, "same": loss}


def _step(run: Any, batch: Any) -> dict[str, Tensor]:
    return _twice(run.model(batch[0]), batch[1])


class Returns(nn.Module):
    """A model that returns its loss and the same again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return _twice(self.net(inputs), targets)


def _own_loop(trainer: Trainer, data: Any) -> Mapping[str, float]:
    with trainer.prepare(make_model(), data, loss=F.cross_entropy, optimizer=STILL) as run:
        for inputs, targets in run.batches():
            loss = run.loss(run.model(inputs), targets)
            run.backward(loss)
            run.log({"same": loss, "constant": 0.5})
            run.step()
    return run.borders.metrics


def _several(trainer: Trainer, data: Any) -> Mapping[str, float]:
    """``train_loss`` is the sum of the losses; the second model's is twice that of the first."""
    models = {"a": make_model(), "b": make_model()}
    with trainer.prepare(models, data, optimizer=dict.fromkeys(models, STILL)) as run:
        for inputs, targets in run.batches():
            for factor, name in enumerate(models, start=1):
                loss = F.cross_entropy(run.models[name](inputs), targets) * factor
                run.models[name].backward(loss)
                run.models[name].step()
    return run.borders.metrics


FORMS: dict[str, Callable[[Trainer, Any], Mapping[str, float]]] = {
    "loss": lambda t, d: t.fit(make_model(), d, loss=_twice, optimizer=STILL).metrics,
    "step": lambda t, d: t.fit(make_model(), d, step=_step, optimizer=STILL).metrics,
    "model": lambda t, d: t.fit(Returns(), d, optimizer=STILL).metrics,
    "closure": lambda t, d: (
        t.fit(make_model(), d, loss=_twice, optimizer=partial(LBFGS, lr=0.0, max_iter=1)).metrics
    ),
    "own loop": _own_loop,
    "several models": _several,
}


def _all_forms(world_size: int) -> dict[tuple[str, str], dict[str, float]]:
    found = {}
    for form, train in FORMS.items():
        for ending, num_samples in SAMPLES.items():
            trainer = make_trainer(
                strategy="ddp" if world_size > 1 else "single",
                data=of_dataset(8 // world_size),
                max_epochs=2,
            )
            found[form, ending] = dict(train(trainer, make_data(num_samples)))
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def logged(request: pytest.FixtureRequest) -> list[dict[tuple[str, str], dict[str, float]]]:
    """By rank: what was logged by form and ending."""
    world_size: int = request.param
    if world_size == 1:
        return [_all_forms(1)]
    return run_ranks(_all_forms, 2, 2, timeout_seconds=300)


@pytest.mark.parametrize("ending", SAMPLES)
@pytest.mark.parametrize("form", FORMS)
def test_a_scalar_beside_the_loss_is_the_mean_over_all_samples(
    form: str, ending: str, logged: list[dict[tuple[str, str], dict[str, float]]]
) -> None:
    inputs, targets = make_data(SAMPLES[ending]).tensors
    mean = F.cross_entropy(make_model()(inputs), targets).item()
    shares = {"same": 1, "train_loss": 1}
    if form == "several models":
        shares = {"train_loss/a": 1, "train_loss/b": 2, "train_loss": 3}

    for metrics in (of_rank[form, ending] for of_rank in logged):
        for name, share in shares.items():
            assert metrics[name] == pytest.approx(share * mean, rel=1e-6), name
            assert metrics[f"{name}/epoch"] == pytest.approx(share * mean, rel=1e-6), name
        if form == "own loop":
            assert metrics["constant"] == metrics["constant/epoch"] == 0.5


def test_a_stream_without_a_length_logs_by_name_what_it_logs_as_its_loss() -> None:
    """Its batches have 4, 4 and 2 samples."""
    trainer = make_trainer(max_steps=6)

    metrics = trainer.fit(
        make_model(), DataLoader(Stream(10), 4), loss=_twice, optimizer=partial(SGD, lr=0.1)
    ).metrics

    assert metrics["same"] == pytest.approx(metrics["train_loss"], rel=1e-12)
    assert metrics["same/epoch"] == pytest.approx(metrics["train_loss/epoch"], rel=1e-12)

"""Evaluation and the trial before step 1: exact, and without a trace in what is trained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.core.trainings import (
    SGD_FACTORY,
    arguments,
    assert_same,
    fit,
    make_data,
    make_loader,
    make_model,
    make_net,
    make_trainer,
    of_dataset,
    weights,
)
from torchweld.errors import InvalidArgument, RanksDisagree, RunError
from torchweld.testing import run_ranks


def correct(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return (outputs.argmax(1) == targets).sum(), len(targets)


def by_hand(model: nn.Module, num_samples: int = 13) -> tuple[float, float]:
    """Loss and accuracy of all samples at once."""
    inputs, targets = make_data(num_samples).tensors
    with torch.no_grad():
        outputs = model.eval()(inputs)
    accuracy = (outputs.argmax(1) == targets).float().mean().item()
    return F.cross_entropy(outputs, targets).item(), accuracy


def bare_loop(model: nn.Module, loader: DataLoader[Any], epochs: int) -> nn.Module:
    optimizer = SGD_FACTORY(model.parameters())
    model.train()
    for _ in range(epochs):
        for inputs, targets in loader:
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


# ---- no trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"val_check_interval": 1}, {"val_check_interval": 2, "log_every_n_steps": 1}],
    ids=["each epoch", "each step", "with logs"],
)
def test_validation_leaves_random_state_and_buffers_alone(settings: dict[str, Any]) -> None:
    model, expected = make_net(), make_net()

    torch.manual_seed(5)
    fit(
        model,
        make_loader(shuffle=True),
        make_loader(13, shuffle=True),
        metrics={"accuracy": correct},
        settings={"max_epochs": 3, **settings},
    )

    torch.manual_seed(5)
    assert_same(model, bare_loop(expected, make_loader(shuffle=True), 3))


def test_the_random_state_after_fit_is_that_of_a_loop_by_hand() -> None:
    nets = make_net(), make_net()

    torch.manual_seed(5)
    fit(nets[0], make_loader(shuffle=True), make_loader(13, shuffle=True))
    after_fit = torch.get_rng_state()

    torch.manual_seed(5)
    bare_loop(nets[1], make_loader(shuffle=True), 1)
    assert torch.equal(after_fit, torch.get_rng_state())


class Counts(nn.Module):
    """Replaces a buffer in every forward, as some layers do."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
        outputs: Tensor = self.net(inputs)
        return outputs


def test_the_trial_puts_back_a_buffer_that_forward_replaces() -> None:
    model = Counts()

    fit(model, make_loader())

    assert model.calls.item() == 6


class RunningScale(nn.Module):
    """A loss with a state of its own."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets)


def test_the_trial_puts_back_the_state_of_a_loss() -> None:
    loss = RunningScale()

    fit(make_model(), make_loader(), loss=loss)

    assert loss.calls.item() == 6


def test_a_loss_is_called_with_the_users_targets_only_where_nobody_asks_for_others() -> None:
    seen: list[Tensor] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return F.cross_entropy(outputs, targets)

    fit(make_model(), make_loader(), loss=loss)

    assert len(seen) == 7
    assert all(targets.shape == (4,) for targets in seen)


def test_a_layer_that_the_loop_put_into_evaluation_stays_there() -> None:
    model = make_net()
    settings = {"val_check_interval": 1}

    with make_trainer(**settings).prepare(
        model, make_loader(), make_loader(13), **arguments()
    ) as run:
        model[1].eval()
        for inputs, targets in run.batches():
            run.backward(run.loss(run.model(inputs), targets))
            run.step()

    assert torch.equal(model[1].running_mean, torch.zeros(16))
    assert [model[1].training, model[3].training] == [False, True]


# ---- what is measured ----------------------------------------------------------------------------


def test_validation_is_weighted_by_real_counts() -> None:
    model = make_net()

    result = fit(model, make_loader(), make_loader(13), metrics={"accuracy": correct})

    loss, accuracy = by_hand(model)
    assert result.metrics["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert result.metrics["val_accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_several_validation_sets_are_named() -> None:
    model = make_model()
    sets = {"seen": make_loader(), "unseen": make_loader(13)}

    result = fit(model, make_loader(), sets, metrics={"accuracy": correct})

    assert result.metrics["val_loss/seen"] == pytest.approx(by_hand(model, 24)[0], rel=1e-6)
    assert result.metrics["val_accuracy/unseen"] == pytest.approx(by_hand(model)[1], rel=1e-6)
    assert "val_loss" not in result.metrics


class Largest:
    """A metric object; says how often it was reset."""

    def __init__(self) -> None:
        self.resets = 0
        self.reset()

    def reset(self) -> None:
        self.resets += 1
        self.value, self.samples = -1e9, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.value = max(self.value, outputs.max().item())
        self.samples += len(targets)

    def compute(self) -> float:
        return self.value


def test_metric_objects_are_reset_updated_and_computed() -> None:
    model, metric = make_model(), Largest()

    result = fit(model, make_loader(), make_loader(13), metrics={"largest": metric},
                 settings={"max_epochs": 2})  # fmt: skip

    with torch.no_grad():
        expected = model.eval()(make_data(13).tensors[0]).max().item()
    assert result.metrics["val_largest"] == pytest.approx(expected, rel=1e-6)
    assert (metric.resets, metric.samples) == (3, 13)


class Named:
    """Names its values itself, as a collection does; ``keys`` says which where there is one."""

    def __init__(self, **values: float) -> None:
        self.values = values

    def reset(self) -> None:
        """Nothing is kept."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Nothing is counted."""

    def compute(self) -> dict[str, float]:
        return self.values


class Collection(Named):
    def keys(self) -> list[str]:
        return list(self.values)


@pytest.mark.parametrize("kind", [Named, Collection])
@pytest.mark.parametrize(
    ("make", "value", "owner"),
    [
        (lambda kind: kind(loss=3.0), "loss", "the loss"),
        (lambda kind: {"a_b": correct, "a": kind(b=1.0)}, "a_b", "metric 'a_b'"),
    ],
)
def test_values_of_one_name_are_refused(kind: Any, make: Any, value: str, owner: str) -> None:
    words = f"has a value '{value}', and {owner} is measured under .* rename it"

    with pytest.raises(InvalidArgument, match=words):
        fit(make_model(), make_loader(), make_loader(13), metrics=make(kind))
    with pytest.raises(InvalidArgument, match=words):
        make_trainer().evaluate(
            make_model(), make_loader(13), loss=F.cross_entropy, metrics=make(kind)
        )


def test_eval_step_replaces_the_forward_of_evaluation() -> None:
    model = make_model()

    def eval_step(run: Any, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return run.model(inputs) + run.model(-inputs), targets

    result = fit(model, make_loader(), make_loader(13), eval_step=eval_step)

    inputs, targets = make_data(13).tensors
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs) + model(-inputs), targets).item()
    assert result.metrics["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_step_trains_on_batches_of_any_form_with_further_scalars() -> None:
    model, expected = make_model(), make_model()
    triples = [(x, y, torch.ones(())) for x, y in make_loader()]

    def step(run: Any, batch: Any) -> Mapping[str, Tensor]:
        inputs, targets, weight = batch
        loss = F.cross_entropy(run.model(inputs), targets) * weight
        return {"loss": loss, "twice": 2 * loss}

    result = fit(model, iter(triples), loss=None, step=step, settings={"max_steps": 6})

    assert_same(model, bare_loop(expected, make_loader(), 1))
    assert result.metrics["twice"] == pytest.approx(2 * result.metrics["train_loss"], rel=1e-6)


def test_a_loss_may_return_further_scalars() -> None:
    model, expected = make_model(), make_model()

    def loss(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(outputs, targets), "size": outputs.abs().mean()}

    result = fit(model, make_loader(), make_loader(13), loss=loss)

    assert_same(model, bare_loop(expected, make_loader(), 1))
    assert result.metrics["size"] > 0
    assert result.metrics["val_loss"] == pytest.approx(by_hand(model)[0], rel=1e-6)


def test_a_model_that_takes_pairs_and_returns_its_loss() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.net(inputs), targets)}

    model = Whole()

    result = fit(model, make_loader(), make_loader(13), loss=None)

    assert_same(model.net, bare_loop(make_model(), make_loader(), 1))
    assert result.metrics["val_loss"] == pytest.approx(by_hand(model.net)[0], rel=1e-6)


# ---- on its own ----------------------------------------------------------------------------------


def test_evaluate_measures_the_trained_model() -> None:
    model, trainer = make_net(), make_trainer()
    trainer.fit(model, make_loader(), **arguments())

    result = trainer.evaluate(data=make_loader(13), metrics={"accuracy": correct})

    loss, accuracy = by_hand(model)
    assert result == pytest.approx({"loss": loss, "accuracy": accuracy}, rel=1e-6)


def sets() -> dict[str, DataLoader[Any]]:
    return {"seen": make_loader(), "unseen": make_loader(13)}


def of_both_by_hand(model: nn.Module) -> Any:
    (seen, accuracy), (unseen, other) = by_hand(model, 24), by_hand(model)
    values = {"loss/seen": seen, "accuracy/seen": accuracy}
    return pytest.approx({**values, "loss/unseen": unseen, "accuracy/unseen": other}, rel=1e-6)


def test_several_sets_are_evaluated_under_the_names_that_fit_gives_them() -> None:
    model, trainer = make_net(), make_trainer()
    during: list[Mapping[str, float]] = []
    metrics = {"accuracy": correct}

    fresh = trainer.evaluate(model, sets(), loss=F.cross_entropy, metrics=metrics)
    before = of_both_by_hand(make_net())
    with trainer.prepare(model, make_loader(), sets(), **arguments(metrics=metrics)) as run:
        for inputs, targets in run.batches():
            run.backward(run.loss(run.model(inputs), targets))
            run.step()
        during.append(run.evaluate(sets()))
    after = trainer.evaluate(data=sets())

    assert fresh == before
    assert during[0] == after == of_both_by_hand(model)
    logged = run.result().metrics
    assert {f"val_{name}": value for name, value in after.items()}.items() <= logged.items()
    with pytest.raises(InvalidArgument, match=r"'seen', 'unseen'.* call it once for each"):
        trainer.predict(data=sets())
    with pytest.raises(InvalidArgument, match="has no set to evaluate"):
        trainer.evaluate(data={})


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_another_model_as_it_was(training: bool) -> None:
    model = make_net().train(training)
    expected = by_hand(make_net())[0]
    before, state = weights(model), torch.get_rng_state()

    result = make_trainer().evaluate(model, make_loader(13, shuffle=True), loss=F.cross_entropy)

    assert torch.equal(torch.get_rng_state(), state)
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(before[name], w) for name, w in weights(model).items())


def test_predict_returns_outputs_in_order_also_of_inputs_alone() -> None:
    model = make_net()
    inputs = make_data(13).tensors[0]
    trainer = make_trainer(data=of_dataset())

    from_pairs = trainer.predict(model, make_data(13))
    from_inputs = trainer.predict(model, TensorDataset(inputs))

    with torch.no_grad():
        expected = model.eval()(inputs)
    assert [len(outputs) for outputs in from_pairs] == [4, 4, 4, 1]
    torch.testing.assert_close(torch.cat(from_pairs), expected)
    assert torch.equal(torch.cat(from_pairs), torch.cat(from_inputs))


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize("loss", [F.cross_entropy, None])
def test_evaluating_on_nothing_is_an_error(loss: Any) -> None:
    trainer = make_trainer(data=of_dataset())

    with pytest.raises(RunError, match="read no sample"):
        trainer.evaluate(make_model(), Empty(), loss=loss, metrics={"accuracy": correct})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": make_loader()}, "nothing was trained yet; give the model"),
        ({"model": make_model()}, "data=None: give the data"),
        (
            {"model": make_model(), "data": make_loader(), "loss": "mse"},
            "loss='mse' is no function",
        ),
        ({"model": make_model(), "data": make_loader(), "metrics": correct}, "give a mapping"),
        (
            {"model": make_model(), "data": DataLoader(TensorDataset(*[torch.ones(4, 5)] * 3), 2)},
            "list of 3 items.*give eval_step=",
        ),
    ],
    ids=["no model", "no data", "loss by name", "metrics without names", "three items"],
)
def test_evaluate_refuses_what_cannot_work(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        make_trainer().evaluate(**given)


# ---- two processes -------------------------------------------------------------------------------


def evaluate_net() -> tuple[dict[str, float], dict[str, Tensor], str]:
    """BatchNorm normalises each process's own batch, so the buffers differ until evaluation."""
    model = make_net()
    settings = {"strategy": "ddp", "data": of_dataset(), "seed": 3}
    trainer = make_trainer(**settings)
    trainer.fit(model, make_data(22), **arguments())
    result = trainer.evaluate(data=make_data(13), metrics={"accuracy": correct})
    try:
        trainer.evaluate(data=make_data(13), metrics={"largest": Largest()})
    except InvalidArgument as error:
        return result, weights(model), str(error)
    return result, weights(model), "no error"


def test_two_processes_evaluate_with_the_buffers_of_the_first() -> None:
    first, second = run_ranks(evaluate_net, 2)

    model = make_net()
    model.load_state_dict(first[1])
    loss, accuracy = by_hand(model)
    assert first[0] == pytest.approx({"loss": loss, "accuracy": accuracy}, rel=1e-6)
    assert first[0] == second[0]
    assert "has no sync()" in first[2]


def evaluate_sets() -> tuple[dict[str, float], str]:
    """The second time one of the ranks has them in another order."""
    trainer, metrics = make_trainer(strategy="ddp", data=of_dataset()), {"accuracy": correct}
    given: dict[str, Any] = {"loss": F.cross_entropy, "metrics": metrics}
    found = trainer.evaluate(make_net(), {"seen": make_data(), "unseen": make_data(13)}, **given)
    names = ["seen", "unseen"][:: -1 if os.environ["RANK"] == "1" else 1]
    try:
        trainer.evaluate(make_net(), {name: make_data(13) for name in names}, **given)
    except RanksDisagree as error:
        return found, str(error)
    return found, "no error"


def test_two_processes_evaluate_several_sets_in_one_order() -> None:
    for found, refused in run_ranks(evaluate_sets, 2):
        assert found == of_both_by_hand(make_net())
        assert "data: ['seen', 'unseen'] (rank 0), ['unseen', 'seen'] (rank 1)" in refused


def predict_all(num_samples: int) -> list[Tensor]:
    trainer = make_trainer(strategy="ddp", data=of_dataset())
    return trainer.predict(make_model(), make_data(num_samples))


def test_two_processes_predict_each_sample_once() -> None:
    parts = run_ranks(predict_all, 2, 9)

    assert [len(torch.cat(outputs)) for outputs in parts] == [5, 4]

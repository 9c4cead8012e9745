"""Several models in one run: what is refused, and what each of them has of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

from torchweld import LRSchedule, Trainer, Unfreeze, use
from torchweld.checkpoint import Checkpoint
from torchweld.errors import CheckpointError, InvalidArgument, LoopError
from torchweld.interfaces import Parts
from torchweld.loop.run import TrainingRun

SGD_EACH = {"a": partial(SGD, lr=0.1), "b": partial(SGD, lr=0.2)}
BATCHES = 5


def models() -> dict[str, nn.Module]:
    """Two layers, one behind the other."""
    torch.manual_seed(0)
    return {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}


def data(num_samples: int = 4 * BATCHES) -> TensorDataset:
    """Vectors and vectors."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(num_samples, 3, generator=generator),
        torch.randn(num_samples, 2, generator=generator),
    )


def trainer(tmp_path: Path, **settings: Any) -> Trainer:
    """One that says nothing."""
    quiet = {"enable_progress_bar": False, "logger": False, "default_root_dir": tmp_path}
    data = use("torch", batch_size=4)
    return Trainer(**{"data": data, "max_epochs": 1, **quiet, **settings})


def prepared(tmp_path: Path, **given: Any) -> TrainingRun:
    """A run over both."""
    settings = given.pop("settings", {})
    arguments = {"optimizer": SGD_EACH, **given}
    return trainer(tmp_path, **settings).prepare(
        arguments.pop("model", models()), data(), **arguments
    )


def step(run: TrainingRun, name: str, loss: Tensor) -> None:
    """Backward and step of one model."""
    run.models[name].backward(loss)
    run.models[name].step()


def step_both(run: TrainingRun, batch: Any) -> None:
    """Each learns with the other frozen."""
    inputs, targets = batch
    for name in ("a", "b"):
        with run.models[name].alone():
            step(run, name, F.mse_loss(run.models["b"](run.models["a"](inputs)), targets))


# ---- what is refused before anything is started --------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt optimizer": (
        {"model": {"critic": nn.Linear(1, 1)}, "optimizer": {"critik": partial(SGD, lr=0.1)}},
        "optimizer names 'critik', which is no model: did you mean 'critic'?",
    ),
    "no optimizer for one": ({"optimizer": {"a": SGD_EACH["a"]}}, "none for the model 'b'"),
    "one optimizer for all": ({"optimizer": SGD_EACH["a"]}, "optimizer=partial was given for"),
    "no optimizer at all": ({"optimizer": {"a": None, "b": None}}, "nothing would be trained"),
    "a misspelt scheduler": ({"lr_scheduler": {"c": StepLR}}, "lr_scheduler names 'c'"),
    "a made scheduler": ({"lr_scheduler": {"a": 3}}, "lr_scheduler=3 is no schedule"),
    "a rule for all": ({"param_groups": lambda *_: {}}, "param_groups=function was given"),
    "weights for none": ({"init_weights": {"c": {}}}, "init_weights names 'c'"),
    "a name with a dot": ({"model": {"a.b": nn.Linear(1, 1)}}, "named after their model"),
    "a name of a wrapper": ({"model": {"module": nn.Linear(1, 1)}}, "named after their model"),
    "validation": ({"val": data()}, "eval_step=(run, batch)"),
    "a closure": ({"optimizer": {**SGD_EACH, "b": LBFGS}}, "optimizer of 'b', LBFGS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_name(case: str, tmp_path: Path) -> None:
    given, message = REFUSED[case]

    with pytest.raises(InvalidArgument, match=re.escape(message)):
        prepared(tmp_path, **given)


def test_a_parameter_of_two_models_is_refused(tmp_path: Path) -> None:
    shared = nn.Linear(3, 3)

    with pytest.raises(InvalidArgument, match="'a' and 'b' share a parameter"):
        prepared(tmp_path, model={"a": nn.Sequential(shared), "b": shared})


def test_fit_of_several_models_needs_a_step_and_one_optimizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"the models a, b and no step="):
        trainer(tmp_path).fit(models(), data(), loss=F.mse_loss, optimizer=SGD_EACH)
    with pytest.raises(InvalidArgument, match=r"a, b have optimizers: write the loop"):
        trainer(tmp_path).fit(models(), data(), step=lambda *_: None, optimizer=SGD_EACH)


def _wraps(parts: Parts) -> Parts:
    return Parts(nn.Sequential(parts.model), parts.loss, optimizer=parts.optimizer)


def test_a_surgery_that_makes_one_of_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"surgery is done on an nn\.ModuleDict"):
        prepared(tmp_path, settings={"surgery": _wraps})


# ---- the guard -----------------------------------------------------------------------------------


def _twice(run: TrainingRun, batch: Any) -> None:
    for _ in range(2):
        run.models["a"].backward(run.models["a"](batch[0]).mean())


def _without_step(run: TrainingRun, batch: Any) -> None:
    run.models["a"].backward(run.models["a"](batch[0]).mean())


def _without_backward(run: TrainingRun, _batch: Any) -> None:
    run.models["a"].step()


def _two_steps(run: TrainingRun, batch: Any) -> None:
    step(run, "a", run.models["a"](batch[0]).mean())
    run.models["a"].step()


def _nothing(_run: TrainingRun, _batch: Any) -> None:
    pass


def _not_alone(run: TrainingRun, batch: Any) -> None:
    step(run, "a", run.models["b"](run.models["a"](batch[0])).mean())


def _which(run: TrainingRun, batch: Any) -> None:
    run.backward(run.models["a"](batch[0]).mean())


def _no_single(run: TrainingRun, batch: Any) -> None:
    run.model(batch[0])


MISUSES: dict[str, tuple[Callable[[TrainingRun, Any], None], str]] = {
    "two backwards": (_twice, "backward(loss) was called twice for one batch"),
    "no step": (_without_step, "run.models['a'].step() is missing after its backward"),
    "no backward": (_without_backward, "without a backward of this model"),
    "two steps": (_two_steps, "run.models['a'].step() was called twice"),
    "no model used": (_nothing, "the last batch was handed out and not used"),
    "a gradient left in another": (_not_alone, "left gradients in 'b'"),
    "which model": (_which, "several models (a, b): call it of one, run.models['a'].backward"),
    "the only model": (_no_single, "this run has several models (a, b): say which"),
}


def _drive(run: TrainingRun, act: Callable[[TrainingRun, Any], None]) -> None:
    with run:
        for batch in run.batches():
            act(run, batch)


@pytest.mark.parametrize("case", MISUSES)
def test_a_misuse_of_one_of_the_models_is_an_error(case: str, tmp_path: Path) -> None:
    act, message = MISUSES[case]

    with pytest.raises((LoopError, InvalidArgument), match=re.escape(message)):
        _drive(prepared(tmp_path), act)


def test_a_module_called_in_place_of_the_runs_is_an_error_where_it_matters(tmp_path: Path) -> None:
    given = models()

    def around(run: TrainingRun, batch: Any) -> None:
        run.models["a"].backward(given["a"](batch[0]).mean())

    run = prepared(tmp_path, model=given, settings={"precision": "bf16"})
    with pytest.raises(LoopError, match=re.escape("without run.models['a'](…)")):
        _drive(run, around)


def test_a_model_takes_part_in_a_whole_window_or_not_at_all(tmp_path: Path) -> None:
    numbers = itertools.count()

    def odd_ones(run: TrainingRun, batch: Any) -> None:
        step(run, "a", run.models["a"](batch[0]).mean())
        if next(numbers) % 2:
            step(run, "b", run.models["b"](run.models["a"](batch[0]).detach()).mean())

    run = prepared(tmp_path, settings={"accumulate_grad_batches": 2})
    with pytest.raises(LoopError, match="b took part in one batch of an accumulation window"):
        _drive(run, odd_ones)


def one_after_the_other(run: TrainingRun, batch: Any) -> None:
    """Each is stepped before the backward of the next, which is cut off by detaching."""
    hidden = run.models["a"](batch[0])
    step(run, "a", hidden.square().mean())
    step(run, "b", F.mse_loss(run.models["b"](hidden.detach()), batch[1]))


def test_models_that_are_frozen_in_turn_are_stepped_inside_a_window(tmp_path: Path) -> None:
    run = prepared(tmp_path, settings={"accumulate_grad_batches": 2})
    _drive(run, step_both)

    assert run.progress.step == 3  # of five batches


def test_models_are_stepped_one_after_the_other_inside_a_window(tmp_path: Path) -> None:
    ended = []
    for accumulate, batch_size in ((2, 4), (1, 8)):
        given = models()
        settings = {
            "accumulate_grad_batches": accumulate,
            "data": use("torch", batch_size=batch_size, shuffle=False),
        }
        _drive(prepared(tmp_path, model=given, settings=settings), one_after_the_other)
        ended.append([p for model in given.values() for p in model.parameters()])

    for accumulated, whole in zip(*ended, strict=True):
        torch.testing.assert_close(accumulated, whole)


def test_a_gradient_left_in_a_model_that_waits_for_its_step_is_an_error(tmp_path: Path) -> None:
    def around(run: TrainingRun, batch: Any) -> None:
        step(run, "a", run.models["a"](batch[0]).mean())
        step(run, "b", run.models["b"](run.models["a"](batch[0])).mean())

    run = prepared(tmp_path, settings={"accumulate_grad_batches": 2})
    with pytest.raises(LoopError, match="the loss of 'b' left gradients in 'a'"):
        _drive(run, around)


def test_saving_between_backward_and_step_of_a_model_is_an_error(tmp_path: Path) -> None:
    with prepared(tmp_path) as run:
        for inputs, _ in run.batches():
            run.models["a"].backward(run.models["a"](inputs).mean())
            with pytest.raises(LoopError, match="half a gradient"):
                run.save()
            run.models["a"].step()
            assert run.save().name == f"step-{run.progress.step}"
            with pytest.raises(LoopError, match="without a new batch"):
                run.models["b"].backward(run.models["b"](torch.ones(1, 4)).mean())


# ---- each has its own ----------------------------------------------------------------------------


def test_a_model_that_is_trained_every_other_batch_has_its_own_schedule(tmp_path: Path) -> None:
    halve = {"b": lambda optimizer, _: StepLR(optimizer, 1, gamma=0.5)}

    with prepared(tmp_path, lr_scheduler=halve) as run:
        for number, (inputs, _) in enumerate(run.batches()):
            step(run, "a", run.models["a"](inputs).mean())
            if number % 2 == 0:
                step(run, "b", run.models["b"](run.models["a"](inputs).detach()).mean())

    assert run.progress.step == BATCHES
    assert run.borders.metrics["lr/a"] == 0.1
    assert run.borders.metrics["lr/b"] == 0.2 / 2**3
    assert {"train_loss/a", "train_loss/b"} <= run.borders.metrics.keys()


def test_groups_and_weights_are_given_by_model(tmp_path: Path) -> None:
    def no_decay(name: str, _module: nn.Module, _parameter: nn.Parameter) -> dict[str, float]:
        return {"weight_decay": 0.5} if name == "weight" else {}

    ones = {"weight": torch.ones(2, 4), "bias": torch.zeros(2)}
    given = models()

    with prepared(
        tmp_path, model=given, param_groups={"a": no_decay}, init_weights={"b": ones}
    ) as run:
        optimizer = run.models["a"].optimizer
        assert optimizer is not None
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        assert torch.equal(given["b"].state_dict()["weight"], torch.ones(2, 4))
        for batch in run.batches():
            step_both(run, batch)

    saved = Checkpoint.open(next(tmp_path.glob("*/step-5"))).header["groups"]
    assert [group["names"] for group in saved] == [["a.weight"], ["a.bias"], ["b.weight", "b.bias"]]


def test_export_writes_a_file_for_each_model(tmp_path: Path) -> None:
    given = models()
    with prepared(tmp_path, model=given) as run:
        for batch in run.batches():
            step_both(run, batch)

        path = run.export(tmp_path / "weights")

    for name, model in given.items():
        saved = load_file(path / f"{name}.safetensors")
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


def test_another_optimizer_or_schedule_of_one_model_does_not_resume(tmp_path: Path) -> None:
    halve = {"b": lambda optimizer, _: StepLR(optimizer, 1, gamma=0.5)}
    with prepared(tmp_path, lr_scheduler=halve) as run:
        for batch in run.batches():
            step_both(run, batch)
    longer = {"max_epochs": 2}

    with pytest.raises(CheckpointError, match="optimizer a: SGD, b: SGD"):
        prepared(
            tmp_path, lr_scheduler=halve, ckpt_path="last", settings=longer,
            optimizer={**SGD_EACH, "b": partial(Adam, lr=0.1)},
        )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"lr_scheduler \{'b': 'StepLR'\}"):
        prepared(
            tmp_path, ckpt_path="last", settings=longer,
            lr_scheduler={"b": lambda optimizer, _: ExponentialLR(optimizer, 0.9)},
        )  # fmt: skip


def test_what_each_model_holds_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with prepared(tmp_path) as run:
        for batch in run.batches():
            step_both(run, batch)

    said = capsys.readouterr().out
    assert "a: single: 16 parameters" in said
    assert "b: memory: 40 B parameters" in said


def test_each_model_may_have_its_schedule_by_epoch_or_by_a_metric(tmp_path: Path) -> None:
    plateau = partial(
        ReduceLROnPlateau, factor=0.5, patience=0, threshold=100.0, threshold_mode="abs"
    )
    schedules = {
        "a": LRSchedule(lambda optimizer, _: StepLR(optimizer, 1, 0.1), interval="epoch"),
        "b": LRSchedule(plateau, monitor="val_loss"),  # no value is smaller by 100
    }
    rates: dict[str, list[float]] = {"a": [], "b": []}

    with prepared(
        tmp_path, lr_scheduler=schedules, val=data(8), settings={"max_epochs": 3},
        eval_step=lambda run, batch: (run.models["b"](run.models["a"](batch[0])), batch[1]),
        loss=F.mse_loss,
    ) as run:  # fmt: skip
        for batch in run.batches():
            step_both(run, batch)
            for name, seen in rates.items():
                optimizer: Any = run.models[name].optimizer
                seen.append(optimizer.param_groups[0]["lr"])

    by_epoch = [rate for rate in (0.1, 0.01, 0.001) for _ in range(BATCHES)]
    by_metric = [rate for rate in (0.2, 0.2, 0.1) for _ in range(BATCHES)]  # the first is the best
    assert rates["a"] == pytest.approx(by_epoch)
    assert rates["b"] == pytest.approx(by_metric)


# ---- a frozen second model, and evaluation -------------------------------------------------------


def _distil(run: Any, batch: Any) -> dict[str, Tensor]:
    inputs, targets = batch
    outputs = run.models["student"](inputs)
    near = F.mse_loss(outputs, run.models["teacher"](inputs))
    return {"loss": near + F.mse_loss(outputs, targets), "near": near}


def _teacher() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def _evaluate(run: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return run.models["student"](batch[0]), batch[1]


@pytest.mark.parametrize("own", [False, True], ids=["fit", "own loop"])
def test_a_student_learns_of_a_frozen_teacher_as_in_plain_pytorch(
    own: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    expected, teacher = nn.Linear(3, 2), _teacher().eval()
    optimizer = SGD(expected.parameters(), lr=0.1)
    scheduler = ExponentialLR(optimizer, 0.9)
    samples = data()
    for start in range(0, len(samples), 4):
        inputs, targets = samples[start : start + 4]
        outputs = expected(inputs)
        near = F.mse_loss(outputs, teacher(inputs))
        (near + F.mse_loss(outputs, targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    torch.manual_seed(1)
    student, given = nn.Linear(3, 2), _teacher()
    arguments: dict[str, Any] = {
        "optimizer": {"student": partial(SGD, lr=0.1), "teacher": None},
        "lr_scheduler": {"student": lambda optimizer, _: ExponentialLR(optimizer, 0.9)},
        "val": data(8),
        "eval_step": _evaluate,
    }

    ordered = Trainer(
        data=use("torch", batch_size=4, shuffle=False), enable_progress_bar=False, logger=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    pair = {"student": student, "teacher": given}
    if own:
        with ordered.prepare(pair, samples, loss=F.mse_loss, **arguments) as run:
            for batch in run.batches():
                run.backward(_distil(run, batch)["loss"])
                run.step()
    else:
        result = ordered.fit(pair, samples, step=_distil, **arguments)
        assert "near" in result.metrics

    assert torch.equal(student.weight, expected.weight)
    assert all(p.grad is None and not p.requires_grad for p in given.parameters())
    assert all(torch.equal(a, b) for a, b in zip(given.buffers(), teacher.buffers(), strict=True))


def test_several_models_are_evaluated_by_eval_step(tmp_path: Path) -> None:
    def evaluate(run: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return run.models["b"](run.models["a"](batch[0])), batch[1]

    given = models()
    made = trainer(tmp_path)
    with made.prepare(
        given, data(), data(6), loss=F.mse_loss, eval_step=evaluate, optimizer=SGD_EACH
    ) as run:
        for batch in run.batches():
            step_both(run, batch)
    inputs, targets = data(6)[:]

    with torch.no_grad():
        expected = float(F.mse_loss(given["b"](given["a"](inputs)), targets))
    assert run.borders.metrics["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert made.evaluate(data=data(6))["loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InvalidArgument, match="was not trained by this Trainer"):
        made.evaluate(models(), data(6), loss=F.mse_loss)


# ---- frozen until an epoch -----------------------------------------------------------------------


def train_in_turn(run: TrainingRun, batch: Any) -> None:
    """The first learns in the first two epochs, the second afterwards."""
    inputs, targets = batch
    name = "a" if run.progress.epoch < 2 else "b"
    with run.models[name].alone():
        step(run, name, F.mse_loss(run.models["b"](run.models["a"](inputs)), targets))


def test_layers_of_one_of_several_models_are_trained_from_an_epoch_on(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    second.weight.requires_grad_(False)
    before, changed = second.weight.clone(), []
    settings = {"max_epochs": 3, "callbacks": Unfreeze("weight", at_epoch=2, model="b")}

    with prepared(tmp_path, model={"a": first, "b": second}, settings=settings) as run:
        for batch in run.batches():
            train_in_turn(run, batch)
            changed.append(not torch.equal(before, second.weight))

    assert changed == [False] * (2 * BATCHES) + [True] * BATCHES


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ({}, r"of which model of this run \(model='a', model='b'\)"),
        ({"model": "c"}, r"Unfreeze\(\['w'\], at_epoch=1, model='c'\): say of which model"),
        ({"model": "b"}, "this model has no optimizer"),
    ],
)
def test_unfreezing_refuses_a_model_that_cannot_be_meant(
    which: dict[str, str], words: str, tmp_path: Path
) -> None:
    settings = {"callbacks": Unfreeze("w", at_epoch=1, **which)}

    with pytest.raises(InvalidArgument, match=words):
        prepared(tmp_path, settings=settings, optimizer={**SGD_EACH, "b": None})

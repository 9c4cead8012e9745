"""What cannot work is said before step 1, in one sentence with the word that a user acts on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from tests.core.trainings import (
    Stream,
    arguments,
    fit,
    make_data,
    make_loader,
    make_model,
    make_trainer,
    of_dataset,
    weights,
)
from torchweld import Claims, Component, ModelCheckpoint, Rel, Trainer
from torchweld.errors import (
    CheckpointError,
    InvalidArgument,
    PlanError,
    PluginError,
    RunError,
)
from torchweld.testing import empty_registry, run_ranks


def loader_of(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), 4)


INPUTS, LABELS = make_data(8).tensors
THREE = loader_of(INPUTS, INPUTS, LABELS)


class CenterLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs - self.centers, targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def per_class(outputs: Tensor, targets: Tensor) -> Any:
    return torch.zeros(3), len(targets)


def on_sgd(scheduler: Any) -> Any:
    return scheduler(SGD(make_model().parameters(), lr=0.1))


# ---- arguments of fit ----------------------------------------------------------------------------

FIT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no data": ({"train": None}, InvalidArgument, "train=None: give a Dataset"),
    "several models": ({"model": {"g": nn.Linear(5, 3)}}, InvalidArgument, "several models"),
    "model of another kind": ({"model": 7}, InvalidArgument, "model=7: give an nn.Module"),
    "function without a model": ({"model": dict}, InvalidArgument, "returned dict, not an nn"),
    "no optimizer": ({"optimizer": None}, InvalidArgument, "optimizer=None: give a factory"),
    "optimizer of nothing": (
        {"optimizer": lambda groups: None},
        InvalidArgument,
        "returned NoneType, no optimizer",
    ),
    "optimizer with a wrong option": (
        {"optimizer": lambda groups: SGD(groups, learning_rate=0.1)},  # type: ignore[call-arg]  # wrong
        InvalidArgument,
        "optimizer= cannot be made.*'learning_rate'",
    ),
    "optimizer by name": ({"optimizer": "adam"}, InvalidArgument, "'adam' is no optimizer"),
    "loss by name": ({"loss": "cross_entropy"}, InvalidArgument, "loss='cross_entropy' is no func"),
    "loss as a class": (
        {"loss": nn.CrossEntropyLoss},
        InvalidArgument,
        r"is a class: make one of it, CrossEntropyLoss\(\)",
    ),
    "scheduler by name": (
        {"lr_scheduler": "cosine"},
        InvalidArgument,
        r"lr_scheduler='cosine' is no schedule: give a function",
    ),
    "checkpoint misspelt": ({"ckpt_path": "lst"}, CheckpointError, "did you mean 'last'"),
    "step by name": ({"step": "mine"}, InvalidArgument, "step='mine' is no function"),
    "loss per sample": (
        {"loss": partial(F.cross_entropy, reduction="none")},
        RunError,
        r"shape \(4,\): it has to be a scalar",
    ),
    "loss of one number in a row": (
        {"loss": lambda o, t: F.cross_entropy(o, t)[None]},
        RunError,
        r"shape \(1,\)",
    ),
    "loss as a float": ({"loss": lambda o, t: 1.0}, RunError, "returned float: return a scalar"),
    "loss mapping without loss": (
        {"loss": lambda o, t: {"nll": F.cross_entropy(o, t)}},
        RunError,
        r"mapping without 'loss' \(it has \['nll'\]\)",
    ),
    "step of nothing": ({"loss": None, "step": lambda run, batch: None}, RunError, "returned None"),
    "loss with parameters": ({"loss": CenterLoss()}, InvalidArgument, "'centers' that is not"),
    "model without its loss": ({"loss": None}, RunError, "loss=None, so the model is called"),
    "labels (N, 1)": (
        {"train": loader_of(INPUTS, LABELS[:, None])},
        RunError,
        r"targets \(4, 1\) int64: .*targets\.squeeze\(1\)",
    ),
    "numbers (N, 1)": (
        {
            "train": loader_of(INPUTS, INPUTS[:, :1]),
            "model": nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)),
            "loss": F.mse_loss,
        },
        RunError,
        r"squeeze\(1\)",
    ),
    "outputs (N, 1)": (
        {
            "train": loader_of(INPUTS, INPUTS[:, 0]),
            "model": nn.Linear(5, 1),
            "loss": nn.L1Loss(),
        },
        RunError,
        r"outputs \(4, 1\) float32, targets \(4,\) float32: Using a target size",
    ),
    "soft targets for an index loss": (
        {"train": loader_of(INPUTS, F.one_hot(LABELS, 3).float()), "loss": F.nll_loss},
        RunError,
        r"outputs \(4, 3\) float32, targets \(4, 3\) float32",
    ),
    "three items": ({"train": THREE}, InvalidArgument, "list of 3 items.*give step="),
    "a batch of inputs only": (
        {"train": DataLoader(INPUTS, 2)},  # type: ignore[arg-type]  # a tensor is a dataset
        InvalidArgument,
        "first batch is a Tensor",
    ),
    "three items to validate": (
        {"train": THREE, "val": THREE, "loss": None, "step": lambda run, batch: None},
        InvalidArgument,
        "3 items.*give eval_step=",
    ),
    "metric as a mean": (
        {"metrics": {"accuracy": accuracy}},
        InvalidArgument,
        r"metric 'accuracy' returned .*-> \(sum, count\)",
    ),
    "metric of vectors": ({"metrics": {"f": per_class}}, InvalidArgument, r"\(sum, count\)"),
    "metric that fails": (
        {"metrics": {"f": lambda o, t: o.nothing}},
        AttributeError,
        "nothing",
    ),
    "metric called loss": ({"metrics": {"loss": accuracy}}, InvalidArgument, "rename it"),
    "metric without a name": ({"metrics": accuracy}, InvalidArgument, "give a mapping"),
    "metric of another kind": ({"metrics": {"a": 7}}, InvalidArgument, "'a' is a int"),
    "scheduler made before": (
        {"lr_scheduler": on_sgd(partial(lr_scheduler.StepLR, step_size=1))},
        InvalidArgument,
        r"lr_scheduler=StepLR\(…\) belongs to an optimizer made before",
    ),
    "scheduler without the steps": (
        {"lr_scheduler": partial(lr_scheduler.StepLR, step_size=1)},
        InvalidArgument,
        r"called with \(optimizer, total_steps\)",
    ),
    "scheduler of nothing": (
        {"lr_scheduler": lambda optimizer, steps: None},
        InvalidArgument,
        "returned NoneType, which has no step",
    ),
    "scheduler that needs a metric": (
        {"lr_scheduler": lambda optimizer, _: lr_scheduler.ReduceLROnPlateau(optimizer)},
        InvalidArgument,
        "needs a metric",
    ),
    "weights of another kind": ({"init_weights": [1]}, InvalidArgument, "init_weights=list"),
    "weights that are nowhere": (
        {"init_weights": "nowhere.safetensors"},
        CheckpointError,
        "no weights at nowhere",
    ),
    "checkpoint that is nowhere": ({"ckpt_path": "nowhere"}, CheckpointError, "nowhere"),
    "group rule of nothing": (
        {"param_groups": lambda name, module, parameter: None},
        InvalidArgument,
        "param_groups returned None for '0.weight'",
    ),
}


@pytest.mark.parametrize("name", FIT)
def test_fit_refuses_before_step_1(name: str, tmp_path: Path) -> None:
    changed, error, words = FIT[name]
    given = {"model": make_model(), "train": make_loader(), **arguments(), **changed}
    model = given["model"]
    before = weights(model) if isinstance(model, nn.Module) else {}

    with pytest.raises(error, match=words):
        make_trainer(default_root_dir=tmp_path).fit(**given)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert list(tmp_path.iterdir()) == []


# ---- arguments of the Trainer --------------------------------------------------------------------

TRAINER: dict[str, tuple[dict[str, Any], str]] = {
    "no epoch": ({"max_epochs": 0}, "max_epochs=0: give a whole number of at least 1"),
    "part of an epoch": ({"max_epochs": 1.5}, "max_epochs=1.5"),
    "text": ({"max_epochs": "many"}, "max_epochs='many'"),
    "infinite": ({"max_epochs": float("inf")}, "max_epochs=inf"),
    "no step": ({"max_steps": -1}, "max_steps=-1"),
    "precision": ({"precision": "64"}, "precision='64': choose one of 32"),
    "accelerator": ({"accelerator": "tpu"}, "accelerator='tpu': choose 'auto', 'cpu' or 'cuda'"),
    "devices in a list": ({"devices": [0, 1]}, r"devices=\[0, 1\]: give the number"),
    "no device": ({"devices": 0}, "devices=0"),
    "accumulation": ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
    "accumulation as a mapping": ({"accumulate_grad_batches": {0: 2}}, "accumulate_grad_batches"),
    "negative clipping": ({"gradient_clip_val": -1}, "gradient_clip_val=-1"),
    "clipping as text": ({"gradient_clip_val": "0.5"}, "gradient_clip_val='0.5'"),
    "clipping algorithm": ({"gradient_clip_algorithm": "max"}, "choose 'norm' or 'value'"),
    "logging": ({"log_every_n_steps": 0}, "log_every_n_steps=0"),
    "no batches": ({"limit_train_batches": 0}, "limit_train_batches=0: give a count of at least 1"),
    "too many of them": ({"limit_train_batches": 1.5}, "above 0 and at most 1.0"),
    "batches as text": ({"limit_val_batches": "5"}, "limit_val_batches='5'"),
    "batches as a switch": ({"limit_val_batches": True}, "limit_val_batches=True"),
    "validation never": ({"val_check_interval": 0.0}, "above 0 and at most 1.0"),
    "validation by epochs": ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
    "logger": ({"logger": "cvs"}, r"logger='cvs' has no log_metrics"),
    "loggers": ({"logger": [object()]}, "has no log_metrics"),
    "callback": ({"callbacks": [print]}, r"has no at\(border, run\)"),
    "barebones with a callback": (
        {"callbacks": ModelCheckpoint(), "barebones": True},
        "barebones=True leaves out callbacks",
    ),
    "seed": ({"seed": "x"}, "seed='x'"),
    "seed below 0": ({"seed": -1}, "seed=-1"),
}


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_refuses_what_cannot_work(name: str) -> None:
    settings, words = TRAINER[name]

    with pytest.raises(InvalidArgument, match=words):
        Trainer(registry=empty_registry(), **settings)


def test_more_processes_than_launched_are_refused_with_the_command() -> None:
    with pytest.raises(
        InvalidArgument, match=r"1 process was launched.*torchrun --nproc-per-node 2"
    ):
        fit(make_model(), make_loader(), settings={"devices": 2})


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(RunError, match=r"needs a CUDA device.*precision='bf16'"):
        fit(make_model(), make_loader(), settings={"precision": 16, "accelerator": "cpu"})


def test_a_missing_gpu_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InvalidArgument, match="finds no CUDA device"):
        fit(make_model(), make_loader(), settings={"accelerator": "gpu"})


def test_a_stream_without_a_fraction_of_an_epoch() -> None:
    for settings in ({"limit_train_batches": 0.5}, {"val_check_interval": 0.5}):
        with pytest.raises(InvalidArgument, match=r"fraction.*the data has no length"):
            fit(make_model(), Stream(), settings={"data": of_dataset(), "max_steps": 3, **settings})


def test_a_schedule_without_an_end_needs_max_steps() -> None:
    settings = {"data": of_dataset(), "max_epochs": 2}

    with pytest.raises(InvalidArgument, match="give max_steps="):
        fit(make_model(), Stream(), lr_scheduler=lr_scheduler.CosineAnnealingLR, settings=settings)


# ---- where nothing can be written ----------------------------------------------------------------


@pytest.mark.parametrize("writes", ["checkpoints", "logs"])
def test_a_directory_that_cannot_be_written_is_refused(writes: str, tmp_path: Path) -> None:
    place = tmp_path / "runs"
    place.write_text("a file, which stops root as well")
    settings = {
        "barebones": False,
        "default_root_dir": place,
        "enable_checkpointing": writes == "checkpoints",
        "logger": writes == "logs",
    }

    with pytest.raises(CheckpointError, match=r"runs' cannot be .*enable_checkpointing=False"):
        fit(make_model(), make_loader(), settings=settings)


def test_hyper_parameters_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    settings = {"barebones": False, "default_root_dir": tmp_path, "logger": False}

    with pytest.raises(CheckpointError, match="hparams"):
        fit(make_model(), make_loader(), settings=settings, hparams={"object": object()})


# ---- components of strangers ---------------------------------------------------------------------


def needs_soft_targets(claims: Claims) -> Component:
    return Component("soft", "mixes labels", lambda: lambda parts: parts, claims=claims)


SOFT = needs_soft_targets(
    Claims(edits="batch.targets", requires=Rel("loss.accepts_soft_targets", "it mixes labels"))
)


@pytest.mark.parametrize(
    "loss",
    [
        F.nll_loss,
        nn.NLLLoss(),
        lambda outputs, targets: F.nll_loss(outputs.log_softmax(1), targets),
    ],
    ids=["function", "module", "nobody knows"],
)
def test_soft_targets_are_refused_for_an_index_only_loss(loss: Any) -> None:
    with pytest.raises(PlanError, match=r"(?s)TW301.*class indices only.*it mixes labels"):
        fit(make_model(), make_loader(), loss=loss, settings={"surgery": [SOFT]})


def test_a_loss_that_takes_soft_targets_is_found_out() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        assert targets.shape[0] == 4
        return F.cross_entropy(outputs, targets)

    result = fit(make_model(), make_loader(), loss=loss, settings={"surgery": [SOFT]})

    assert result.plan.facts["loss.accepts_soft_targets"]
    assert not result.plan.facts["loss.smooths"]


class RaisesInBuild:
    def build(self, request: Any) -> Any:
        raise OSError("the disk is gone")


class RaisesInSetup:
    backend: Mapping[str, str] = MappingProxyType({})

    def construct(self, make: Any, env: Any, settings: Any) -> Any:
        raise AssertionError

    def setup(self, model: nn.Module, request: Any) -> Any:
        raise OSError("the engine is gone")


def raises() -> Any:
    raise OSError("no licence")


NOTHING = Claims(owns=(), edits=())


def stranger(build: Callable[..., Any]) -> Component:
    return Component("stranger", "fails", build, claims=NOTHING)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": stranger(raises)}, "data 'stranger' could not be built: OSError: no licence"),
        ({"strategy": stranger(raises)}, "strategy 'stranger' could not be built: OSError: no lic"),
        ({"surgery": stranger(raises)}, "surgery 'stranger' could not be built: OSError: no lic"),
        ({"data": stranger(RaisesInBuild)}, "data 'stranger'.*the disk is gone"),
        ({"strategy": stranger(RaisesInSetup)}, "strategy 'stranger'.*the engine is gone"),
    ],
    ids=["data", "strategy", "surgery", "the loader", "the set-up"],
)
def test_a_strangers_component_that_raises_is_named(settings: Any, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        fit(make_model(), make_loader(), settings=settings)


# ---- the same on two processes -------------------------------------------------------------------


def errors_on_two(names: Sequence[str]) -> list[str]:
    """What each of several wrong calls of ``fit`` says on this process."""
    return list(_messages(names))


def _messages(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        changed, error, _ = FIT[name]
        trainer = make_trainer(strategy="ddp", data=of_dataset())
        given = {"model": make_model(), "train": make_data(), **arguments(), **changed}
        try:
            trainer.fit(**given)
        except error as found:
            yield str(found)
        else:
            yield "no error"


def test_both_processes_say_the_same() -> None:
    names = ["loss per sample", "metric as a mean", "scheduler of nothing", "group rule of nothing"]

    one, two = run_ranks(errors_on_two, 2, names)

    assert one == two
    assert "no error" not in one

"""The callbacks of core, at borders only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from tests.core.trainings import (
    Stream,
    arguments,
    make_data,
    make_model,
    make_trainer,
    of_dataset,
    weights,
)
from torchweld import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProfilerWindow,
    Trainer,
    Unfreeze,
    use,
)
from torchweld.errors import InvalidArgument
from torchweld.interfaces import Border, Progress, Result, Run
from torchweld.testing import empty_registry, run_ranks


class Measured:
    """Logs these values as ``score``, one an epoch, whatever the model does."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def at(self, border: Border, run: Run) -> None:
        """Nothing."""

    def extra_metrics(self, run: Run) -> dict[str, float]:
        epoch = run.progress.epoch
        return {"score": self.values[max(0, epoch - 1)]}


def train(root: Path, callbacks: Any, *, model: Any = None, **settings: Any) -> Result:
    given: dict[str, Any] = {
        "data": of_dataset(), "default_root_dir": root, "callbacks": callbacks, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "registry": empty_registry(),
        "enable_checkpointing": False, "seed": 0,
    }  # fmt: skip
    names = ("ckpt_path", "optimizer", "loss")
    more = {name: settings.pop(name) for name in names if name in settings}
    model = make_model() if model is None else model
    return Trainer(**{**given, **settings}).fit(
        model, make_data(), make_data(9), **arguments(**more)
    )


# ---- early stopping ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "epochs"),
    [
        ([3, 2, 1, 1, 1, 1], {"patience": 2}, 5),
        ([1, 2, 3, 3, 3, 3], {"patience": 2, "mode": "max"}, 5),
        ([3, 2.9, 2.8, 2.7, 1, 1], {"patience": 2, "min_delta": 0.5}, 3),
        ([3, 2, 1, 0.5, 0.4, 0.3], {"patience": 2}, 6),
        ([3, float("nan"), 1, 1, 1, 1], {}, 2),
        ([3, float("nan"), 1, 1, 1, 1], {"check_finite": False, "patience": 9}, 6),
        ([3, 2, 1, 1, 1, 1], {"stopping_threshold": 2.5}, 2),
        ([3, 2, 9, 1, 1, 1], {"divergence_threshold": 8.0}, 3),
    ],
)
def test_early_stopping_stops_when_it_should(
    values: list[float], options: dict[str, Any], epochs: int, tmp_path: Path
) -> None:
    stopping = EarlyStopping("score", **options)

    result = train(tmp_path, [Measured(values), stopping], max_epochs=6)

    assert result.progress.epoch == epochs
    assert stopping.stopped_step == (6 * epochs if epochs < 6 else None)


def test_early_stopping_counts_validations_inside_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping = EarlyStopping("val_loss", min_delta=100.0, patience=2)

    result = train(tmp_path, stopping, max_epochs=6, val_check_interval=1)

    assert result.progress.step == 3
    assert "stopped early: val_loss did not improve 2 times in a row" in capsys.readouterr().out


def test_early_stopping_goes_on_counting_after_resuming(tmp_path: Path) -> None:
    values = [1.0, 2, 2, 2, 2, 2]
    train(
        tmp_path, [Measured(values), EarlyStopping("score", patience=3)], max_epochs=2,
        enable_checkpointing=True,
    )  # fmt: skip

    result = train(
        tmp_path, [Measured(values), EarlyStopping("score", patience=3)], max_epochs=6,
        enable_checkpointing=True, ckpt_path="last",
    )  # fmt: skip

    assert result.progress.epoch == 4


def stop_on_two(root: Path) -> int:
    stopping = EarlyStopping("val_loss", min_delta=100.0, patience=1)
    return train(root, stopping, max_epochs=5, strategy="ddp").progress.step


def test_two_processes_stop_together(tmp_path: Path) -> None:
    first, second = run_ranks(stop_on_two, 2, tmp_path)

    assert first == second == 6  # three steps an epoch, stopped after the second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "least"}, "choose 'min' or 'max'"),
        ({"patience": 0}, "at least 1"),
        ({"min_delta": -1.0}, "at least 0"),
    ],
)
def test_early_stopping_refuses_what_cannot_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        EarlyStopping("val_loss", **options)


def test_early_stopping_names_the_metrics_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no such metric; it has .*val_loss"):
        train(tmp_path, EarlyStopping("val_los"))


def test_early_stopping_refuses_a_run_that_never_validates(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="this run never validates; give val="):
        train(tmp_path, EarlyStopping("val_loss"), check_val_every_n_epoch=None)


def test_checkpoints_are_not_compared_by_a_validation_that_never_comes(tmp_path: Path) -> None:
    keep = ModelCheckpoint(monitor="val_loss")

    with pytest.raises(InvalidArgument, match=r"ModelCheckpoint\(monitor='val_loss'\).*give val="):
        train(tmp_path, keep, check_val_every_n_epoch=None, enable_checkpointing=True)
    assert not list(tmp_path.rglob("step-*"))


def stop_on_a_stream() -> str:
    trainer = make_trainer(
        barebones=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        strategy="ddp", data=use("torch", batch_size=4, shard=True), max_steps=2,
        callbacks=[EarlyStopping("train_loss")],
    )  # fmt: skip
    try:
        trainer.fit(make_model(), Stream(), **arguments())
    except InvalidArgument as error:
        return str(error)
    return ""


def test_early_stopping_refuses_epochs_whose_ends_nobody_knows() -> None:
    for said in run_ranks(stop_on_a_stream, 2):
        assert "nobody knows" in said


# ---- what is logged ------------------------------------------------------------------------------


class Kept:
    """A logger that keeps everything."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.rows.append(dict(metrics))


def test_rates_momentum_decay_memory_norm_and_throughput_are_logged(tmp_path: Path) -> None:
    logger = Kept()
    train(
        tmp_path, LearningRateMonitor(), logger=[logger], gradient_clip_val=1.0,
        optimizer=lambda groups: AdamW(groups, lr=0.01, betas=(0.8, 0.9), weight_decay=0.3),
    )  # fmt: skip

    row = logger.rows[-1]
    assert (row["lr"], row["momentum"], row["weight_decay"]) == (0.01, 0.8, 0.3)
    assert row["grad_norm"] > 0
    assert row["samples_per_second"] > 0
    assert 0.01 < row["memory_gib"] < 1000


# ---- means over an epoch -------------------------------------------------------------------------


class StopsAt:
    """Gives a loss of its own, and ends the run early."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.calls = step, 0

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        if torch.is_grad_enabled():
            self.calls += 1
        return {"loss": outputs.sum() * 0 + self.calls, "twice": torch.tensor(2.0 * self.calls)}

    def next_due(self, progress: Progress) -> int | None:
        return self.step

    def at(self, border: Border, run: Run) -> None:
        if border.progress.step == self.step:
            run.save()
            run.stop()


def test_the_line_of_an_epoch_has_its_means_also_when_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopper, logger, second = StopsAt(9), Kept(), StopsAt()  # at the border after it: 10
    settings = {"max_epochs": 2, "log_every_n_steps": 5, "enable_checkpointing": True}
    train(tmp_path, stopper, loss=stopper.loss, enable_progress_bar=True, **settings)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch 1/2"))

    second.calls = 10
    stopping = EarlyStopping("train_loss", patience=9)
    result = train(
        tmp_path, [second, stopping], loss=second.loss, logger=[logger], ckpt_path="last",
        **settings,
    )  # fmt: skip

    assert "loss 3.500   twice 7.000" in line
    assert result.metrics["train_loss"] == 11.5  # of steps 11 and 12, since the last log
    assert result.metrics["train_loss/epoch"] == 9.5  # of steps 7 to 12
    assert result.metrics["twice/epoch"] == 19.0
    assert stopping.best == 9.5


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_checkpoint_callbacks_keep_each_others_files(
    asynchronous: bool, tmp_path: Path
) -> None:
    values = [1.0, 5, 4, 3, 2, 6]
    best = ModelCheckpoint(monitor="score", save_top_k=1, async_save=asynchronous)
    newest = ModelCheckpoint(save_top_k=1, async_save=asynchronous)
    every = ModelCheckpoint(every_n_train_steps=9, every_n_epochs=None, save_top_k=-1)

    result = train(
        tmp_path, [Measured(values), best, newest, every], max_epochs=6, enable_checkpointing=True
    )

    kept = {int(path.name[5:]) for path in tmp_path.glob("*/step-*")}
    assert kept == {6, 9, 18, 27, 36}
    assert result.best_checkpoint is not None
    assert (result.best_checkpoint.name, best.best_score) == ("step-6", 1.0)
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step-36"
    assert result.directory == result.checkpoint.parent


# ---- freezing until an epoch ---------------------------------------------------------------------


def frozen_model() -> nn.Sequential:
    model = make_model()
    model[0].requires_grad_(False)
    return model


class Watching:
    """Notes at the ends of epochs whether the frozen layer has changed."""

    def __init__(self, model: nn.Sequential) -> None:
        self.layer, self.changed = model[0], [False]
        self.before = weights(self.layer)["weight"]

    def at(self, border: Border, run: Run) -> None:
        if "epoch_end" in border.kind:
            self.changed.append(not torch.equal(self.before, weights(self.layer)["weight"]))


def test_unfreezing_trains_from_the_epoch_on(tmp_path: Path) -> None:
    model = frozen_model()
    watching = Watching(model)

    train(tmp_path, [watching, Unfreeze("0.", at_epoch=2)], model=model, max_epochs=3)

    assert watching.changed == [False, False, False, True]


def test_unfreezing_resumes_bitwise(tmp_path: Path) -> None:
    whole, resumed = frozen_model(), frozen_model()
    settings: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}

    def unfreeze() -> list[Any]:
        return [Unfreeze(["0."], at_epoch=1), ModelCheckpoint(every_n_train_steps=8, save_top_k=-1)]

    train(tmp_path / "whole", unfreeze(), model=whole, **settings)
    middle = next((tmp_path / "whole").glob("*/step-8"))
    train(tmp_path / "resumed", unfreeze(), model=resumed, ckpt_path=middle, **settings)

    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


def refused_under_ddp(root: Path) -> str:
    try:
        train(root, Unfreeze("0.", at_epoch=1), model=frozen_model(), strategy="ddp")
    except InvalidArgument as error:
        return str(error)
    return "no error"


def test_unfreezing_is_refused_where_the_strategy_cannot(tmp_path: Path) -> None:
    answers = run_ranks(refused_under_ddp, 2, tmp_path)

    assert all("does not provide 'params.may_unfreeze'" in answer for answer in answers)


@pytest.mark.parametrize(
    ("names", "words"), [("encoder.", "no parameter has such a name"), ("2.", "trained already")]
)
def test_unfreezing_refuses_what_changes_nothing(names: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=words):
        train(tmp_path, Unfreeze(names, at_epoch=1), model=frozen_model())


# ---- profiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop", "expected"), [(2, 4, 2), (0, 3, 3), (4, 99, 2)])
def test_a_profile_has_the_steps_of_its_window(
    start: int, stop: int, expected: int, tmp_path: Path
) -> None:
    window = ProfilerWindow(start, stop)

    result = train(tmp_path, window)

    assert window.path is not None
    assert window.path.parent == result.directory
    events = json.loads(window.path.read_text("utf-8"))["traceEvents"]
    steps = [event for event in events if event.get("name") == "Optimizer.step#SGD.step"]
    assert len(steps) == expected


def _profile_on_two(root: Path) -> str:
    window = ProfilerWindow(1, 2)
    train(root, window, strategy="ddp")
    assert window.path is not None
    return window.path.name


def test_every_process_writes_its_own_profile(tmp_path: Path) -> None:
    names = run_ranks(_profile_on_two, 2, tmp_path)

    assert names == ["profile-1-2-rank0.json", "profile-1-2-rank1.json"]
    assert sorted(path.name for path in tmp_path.rglob("profile-*")) == names


def test_a_window_asks_for_two_borders() -> None:
    window = ProfilerWindow(10, 15)

    assert [window.next_due(Progress(step)) for step in (0, 10, 12, 15)] == [10, 15, 15, None]


def test_fast_dev_run_writes_no_profile(tmp_path: Path) -> None:
    train(tmp_path, ProfilerWindow(0, 1), fast_dev_run=True)

    assert list(tmp_path.iterdir()) == []


def test_a_callback_that_was_not_made_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"is a class: make one of it, EarlyStopping\(…\)"):
        make_trainer(callbacks=[EarlyStopping])

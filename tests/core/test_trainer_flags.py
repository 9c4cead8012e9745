"""Lightning's flags: each does what it says, and off is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # it ships no types
    EventAccumulator,
)
from torch import Tensor, nn

from tests.core.trainings import (
    SGD_FACTORY,
    Stream,
    arguments,
    assert_same,
    fit,
    make_data,
    make_loader,
    make_model,
    make_net,
    make_trainer,
    of_dataset,
    train_by_hand,
    weights,
)
from torchweld import ModelCheckpoint, Trainer
from torchweld.interfaces import Border, Run
from torchweld.testing import empty_registry


class Seen:
    """A callback that notes the borders, and a logger that notes the metrics."""

    def __init__(self) -> None:
        self.borders: list[tuple[int, frozenset[str]]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.hparams: dict[str, Any] = {}
        self.status = ""

    def at(self, border: Border, run: Run) -> None:
        self.borders.append((border.progress.step, border.kind))

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any) -> None:
        self.hparams = dict(params)

    def finalize(self, status: str) -> None:
        self.status = status

    def steps_with(self, kind: str) -> list[int]:
        return [step for step, kinds in self.borders if kind in kinds]


def watched(train: Any = None, val: Any = None, *, model: Any = None, **settings: Any) -> Seen:
    """Train with a callback and a logger, and return what they saw."""
    seen = Seen()
    quiet = {"barebones": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fit(
        make_model() if model is None else model,
        make_loader() if train is None else train,
        val,
        settings={**quiet, "logger": seen, "callbacks": seen, **settings},
    )
    return seen


# ---- how much, how often -------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "steps"), [(2, 2), (99, 6), (0.5, 3), (1.0, 6), (0.01, 1)])
def test_limit_train_batches_counts_or_takes_a_fraction(limit: float, steps: int) -> None:
    model = make_model()

    result = fit(model, make_loader(), settings={"limit_train_batches": limit})

    assert result.progress.step == steps
    assert_same(model, train_by_hand(make_model(), [[b] for b in list(make_loader())[:steps]]))


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (0.5, 2), (99, 4)])
def test_limit_val_batches_counts_or_takes_a_fraction(limit: float, batches: int) -> None:
    model = make_model()

    result = fit(model, make_loader(), make_loader(13), settings={"limit_val_batches": limit})

    inputs, targets = (part[: 4 * batches] for part in make_data(13).tensors)
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs), targets).item()
    assert result.metrics["val_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [6, 12, 18]),
        ({"val_check_interval": 4}, [4, 8, 12, 16, 18]),
        ({"val_check_interval": 0.5}, [3, 6, 9, 12, 15, 18]),
        ({"check_val_every_n_epoch": 2}, [12, 18]),
        ({"check_val_every_n_epoch": None}, [18]),
    ],
    ids=["default", "steps", "fraction", "epochs", "never"],
)
def test_validation_comes_when_it_is_asked_for_and_at_the_end(
    settings: dict[str, Any], steps: list[int]
) -> None:
    seen = watched(val=make_loader(13), max_epochs=3, **settings)

    assert seen.steps_with("eval_start") == steps


def test_metrics_are_logged_every_n_steps_and_at_the_ends_of_epochs() -> None:
    seen = watched(max_epochs=2, log_every_n_steps=4)

    assert [step for step, _ in seen.logged] == [4, 6, 8, 12]
    assert {"train_loss", "lr", "epoch", "samples_per_second"} <= seen.logged[0][1].keys()
    assert seen.status == "success"


def test_the_logged_loss_is_the_mean_since_the_last_log() -> None:
    seen = watched(log_every_n_steps=3)

    model, losses = make_model(), []
    optimizer = SGD_FACTORY(model.parameters())
    for inputs, targets in make_loader():
        loss = F.cross_entropy(model(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logged = [metrics["train_loss"] for _, metrics in seen.logged]
    assert logged == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 4}, 4),
        ({"max_steps": 8}, 8),
        ({"max_steps": 8, "max_epochs": 1}, 6),
        ({}, 6),
        ({"max_steps": 2, "accumulate_grad_batches": 3}, 2),
    ],
)
def test_the_run_ends_with_steps_or_epochs_whichever_is_first(
    settings: dict[str, Any], steps: int
) -> None:
    assert fit(make_model(), make_loader(), settings=settings).progress.step == steps


@pytest.mark.parametrize(("value", "steps"), [(True, 1), (2, 2)])
def test_fast_dev_run_makes_a_few_steps_and_writes_nothing(
    value: int, steps: int, tmp_path: Path
) -> None:
    seen, root = Seen(), tmp_path / "runs"
    trainer = Trainer(
        fast_dev_run=value,
        callbacks=[seen, ModelCheckpoint()],
        max_epochs=9,
        default_root_dir=root,
        registry=empty_registry(),
    )

    result = trainer.fit(make_model(), make_loader(), make_loader(13), **arguments())

    assert (result.progress.step, result.checkpoint) == (steps, None)
    assert seen.steps_with("eval_start") == [steps]
    assert not root.exists()


# ---- off is off ----------------------------------------------------------------------------------


def test_barebones_prints_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    fit(make_model(), make_loader(), make_loader(13), settings={"max_epochs": 2})

    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


OFF = {
    "enable_checkpointing": "*/step-*",
    "logger": "*/events.out.*",
}


@pytest.mark.parametrize("flag", OFF)
def test_what_is_off_is_not_written_and_the_rest_is(flag: str, tmp_path: Path) -> None:
    settings = {"barebones": False, "default_root_dir": tmp_path, flag: False}

    fit(make_model(), make_loader(), settings=settings)

    written = {name: bool(list(tmp_path.glob(pattern))) for name, pattern in OFF.items()}
    assert written == {name: name != flag for name in OFF}


def test_nothing_to_write_makes_no_directory(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    settings = {
        "barebones": False,
        "enable_checkpointing": False,
        "logger": False,
        "default_root_dir": root,
    }

    fit(make_model(), make_loader(), settings=settings)

    assert not root.exists()


def printed(capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    quiet = {"barebones": False, "enable_checkpointing": False, "logger": False}
    fit(make_model(), make_loader(), settings={**quiet, **settings})
    return capsys.readouterr().out


def test_the_summary_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert "75 parameters" in printed(capsys)
    assert "parameters" not in printed(capsys, enable_model_summary=False)


def test_the_line_of_an_epoch_goes_with_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert "epoch 1/1   6/6" in printed(capsys, max_epochs=1)
    assert "epoch" not in printed(capsys, enable_progress_bar=False)


@pytest.mark.parametrize("given", [None, (), []])
def test_no_callbacks_may_be_written_in_any_way(given: Any) -> None:
    assert fit(make_model(), make_loader(), settings={"callbacks": given}).progress.step == 6


@pytest.mark.parametrize("devices", [None, 1, "1", "auto", -1])
def test_one_device_may_be_written_in_any_way(devices: Any) -> None:
    assert fit(make_model(), make_loader(), settings={"devices": devices}).progress.step == 6


# ---- loggers -------------------------------------------------------------------------------------


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    settings = {
        "barebones": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 2,
        "max_epochs": 2,
    }

    fit(make_model(), make_loader(), make_loader(13), settings=settings, hparams={"size": 3})

    (directory,) = tmp_path.iterdir()
    events = EventAccumulator(str(directory)).Reload()
    assert {"train_loss", "val_loss", "lr", "epoch"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train_loss")] == [2, 4, 6, 8, 10, 12]
    assert any("hparams" in tag for tag in events.Tags()["tensors"])


def test_a_logger_of_the_users_own_gets_everything() -> None:
    seen = Seen()
    quiet = {"barebones": False, "enable_checkpointing": False, "enable_progress_bar": False}

    fit(make_model(), make_loader(), hparams={"size": 3}, settings={**quiet, "logger": [seen]})

    assert seen.hparams == {"size": 3}
    assert [step for step, _ in seen.logged] == [6]
    assert seen.status == "success"


def test_loggers_are_closed_when_a_run_fails() -> None:
    seen = Seen()

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        if outputs.requires_grad:
            raise ZeroDivisionError
        return loss

    settings = {"barebones": False, "enable_checkpointing": False, "logger": seen}
    with pytest.raises(ZeroDivisionError):
        fit(make_model(), make_loader(), loss=fails, settings=settings)
    assert seen.status == "failed"


def test_a_loss_that_is_not_finite_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    printed_loss = lambda outputs, targets: F.cross_entropy(outputs, targets) * float("nan")  # noqa: E731
    settings = {"barebones": False, "enable_checkpointing": False, "logger": False, "max_epochs": 3}

    fit(make_model(), make_loader(), loss=printed_loss, settings=settings)

    out = capsys.readouterr().out
    assert out.count("warning: the loss is nan") == 1
    assert "in or before step 6" in out


# ---- seeds ---------------------------------------------------------------------------------------


def test_a_seed_makes_a_run_repeatable_and_none_leaves_the_state_alone() -> None:
    runs = [make_net() for _ in range(3)]
    for seed, model in zip((3, 3, 4), runs, strict=True):
        torch.manual_seed(99)
        fit(model, make_data(), settings={"data": of_dataset(), "seed": seed})

    assert_same(runs[0], runs[1])
    assert not torch.equal(weights(runs[0])["0.weight"], weights(runs[2])["0.weight"])


# ---- precision -----------------------------------------------------------------------------------


class Dtypes(nn.Module):
    """Notes the dtypes inside, and returns nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()
        self.inside: set[torch.dtype] = set()

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        outputs = self.net(inputs)
        self.inside.add(outputs.dtype)
        return {"logits": outputs, "parts": [outputs[:1], (outputs.argmax(1),)]}


@pytest.mark.parametrize(
    ("precision", "inside", "parameters"),
    [
        ("32", torch.float32, torch.float32),
        (32, torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_outputs_are_fp32_whatever_happens_inside(
    precision: Any, inside: torch.dtype, parameters: torch.dtype
) -> None:
    model, seen = Dtypes(), set()

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        seen.update({outputs["logits"].dtype, outputs["parts"][0].dtype})
        assert outputs["parts"][1][0].dtype == torch.int64
        return F.cross_entropy(outputs["logits"], targets)

    result = fit(model, make_loader(), make_loader(13), loss=loss,
                 settings={"precision": precision})  # fmt: skip

    assert model.inside == {inside}
    assert seen == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {parameters}
    assert result.metrics["train_loss"] > 0


def test_bf16_trains_as_autocast_by_hand() -> None:
    model, expected = make_model(), make_model()
    optimizer = SGD_FACTORY(expected.parameters())
    for inputs, targets in make_loader():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = expected(inputs)
        F.cross_entropy(outputs.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    fit(model, make_loader(), settings={"precision": "bf16"})

    assert_same(model, expected)


# ---- the end of a run ----------------------------------------------------------------------------


def test_a_callback_can_stop_a_stream_without_any_other_border() -> None:
    class Stops(Seen):
        def next_due(self, progress: Any) -> int:
            return 5

        def at(self, border: Border, run: Run) -> None:
            if border.progress.step == 5:
                run.stop()

    settings = {"callbacks": Stops(), "max_steps": 4000, "data": of_dataset(), "barebones": False,
                "enable_checkpointing": False, "logger": False}  # fmt: skip

    result = fit(make_model(), Stream(400), settings=settings)

    assert result.progress.step < 300


def test_trainer_can_fit_again_and_goes_on_with_the_model() -> None:
    model, trainer = make_model(), make_trainer()

    for _ in range(2):
        trainer.fit(model, make_loader(), **arguments())

    expected = make_model()
    for _ in range(2):
        train_by_hand(expected, [[b] for b in make_loader()])
    assert_same(model, expected)

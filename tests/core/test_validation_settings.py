"""Which data is trained on and validated, when, in which mode; and what is logged of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from tests.core.test_callbacks import Kept
from tests.core.trainings import (
    BATCH,
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
)
from torchweld import CSVLogger, TensorBoardLogger, Trainer
from torchweld.claims import Claims
from torchweld.components import Component
from torchweld.errors import InvalidArgument
from torchweld.interfaces import Border, Parts, Run
from torchweld.testing import empty_registry, run_ranks


class Events:
    """Notes the steps of validations and of the ends of epochs."""

    def __init__(self) -> None:
        self.validated: list[int] = []

    def at(self, border: Border, run: Run) -> None:
        if "eval_start" in border.kind:
            self.validated.append(border.progress.step)


def extras(**settings: Any) -> Trainer:
    """A Trainer that writes nothing, with callbacks and loggers."""
    given: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "registry": empty_registry(),
    }  # fmt: skip
    return Trainer(**{**given, **settings})


# ---- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"val_check_interval": 0.5}, [3, 6, 9, 12, 15, 18]),
        ({"val_check_interval": 0.25}, [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18]),
        ({"val_check_interval": 1.0}, [6, 12, 18]),
        ({"val_check_interval": 0.5, "check_val_every_n_epoch": 2}, [9, 12, 18]),
        ({"val_check_interval": 4}, [4, 8, 12, 16, 18]),
        ({"val_check_interval": 0.4}, [2, 5, 8, 11, 14, 17, 18]),
        ({"check_val_every_n_epoch": 2}, [12, 18]),
    ],
)
def test_validation_comes_anew_in_each_epoch(settings: dict[str, Any], steps: list[int]) -> None:
    """Epochs of 6 steps; the end of the run is validated in any case."""
    events = Events()

    extras(max_epochs=3, callbacks=events, **settings).fit(
        make_model(), make_loader(), make_loader(5), **arguments()
    )

    assert events.validated == steps


# ---- which data ----------------------------------------------------------------------------------


def dropping(num_samples: int = 9) -> list[Any]:
    """Validation data that would lose its last sample, in every way to say so."""
    data = make_data(num_samples)
    batches = BatchSampler(SequentialSampler(data), BATCH, drop_last=True)
    return [
        DataLoader(data, BATCH, drop_last=True),
        DataLoader(data, BATCH, drop_last=True, shuffle=True),
        DataLoader(data, batch_sampler=batches),
        DataLoader(Stream(num_samples), BATCH, drop_last=True),
    ]


@pytest.mark.parametrize("place", range(4))
def test_drop_last_loses_no_sample_of_evaluation(place: int) -> None:
    model = make_model()

    found = make_trainer().evaluate(model, dropping()[place], loss=F.cross_entropy)

    inputs, targets = make_data(9).tensors
    expected = F.cross_entropy(model(inputs), targets).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_drop_last_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    extras().fit(make_model(), make_loader(), dropping()[0], **arguments())

    assert "validation data: drop_last=True is for training" in capsys.readouterr().out


@pytest.mark.parametrize("amount", [2, 0.34])
@pytest.mark.parametrize("shuffle", [False, True])
def test_overfit_batches_trains_on_the_same_batches_in_every_epoch(
    amount: float, shuffle: bool
) -> None:
    seen: list[Tensor] = []

    def step(run: Any, batch: Any) -> Tensor:
        seen.append(batch[0])
        return F.cross_entropy(run.model(batch[0]), batch[1])

    data = make_loader(shuffle=shuffle)
    make_trainer(max_epochs=3, overfit_batches=amount).fit(
        make_model(), data, step=step, optimizer=arguments()["optimizer"]
    )

    assert len(seen) == 6
    assert all(torch.equal(one, seen[place % 2]) for place, one in enumerate(seen))


def test_overfit_batches_trains_as_by_hand_and_limits_validation() -> None:
    model = make_model()
    data = make_loader(6)  # four samples, then two

    result = fit(model, data, make_loader(), settings={"max_epochs": 4, "overfit_batches": 2})

    assert_same(model, train_by_hand(make_model(), [[batch] for batch in list(data) * 4]))
    inputs, targets = make_data().tensors
    expected = F.cross_entropy(model(inputs[:8]), targets[:8]).item()
    assert result.metrics["val_loss"] == pytest.approx(expected, rel=1e-6)


def double_in_place(parts: Parts) -> Parts:
    return replace(parts, input_transforms=(lambda inputs: inputs.mul_(2.0),))


def test_overfit_batches_gives_a_transform_in_place_fresh_batches() -> None:
    claims = Claims(edits="batch.inputs")
    doubling = Component("doubling", "a test", lambda: double_in_place, claims=claims)
    overfitted, plain = make_model(), make_model()
    data = of_dataset(shuffle=False)
    settings = {"max_epochs": 3, "data": data, "surgery": doubling}

    fit(overfitted, make_data(4), settings={**settings, "overfit_batches": 1})
    fit(plain, make_data(4), settings=settings)

    assert_same(overfitted, plain)


def test_overfit_batches_beside_other_limits_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="limits training and validation itself"):
        make_trainer(overfit_batches=2, limit_val_batches=3)


def overfit_on_two(num_samples: int) -> tuple[int, float]:
    settings = {"strategy": "ddp", "data": of_dataset(), "overfit_batches": 2, "max_epochs": 2}
    result = fit(make_model(), make_data(num_samples), make_data(9), settings=settings)
    return result.progress.samples, result.metrics["val_loss"]


def test_two_processes_overfit_an_uneven_batch() -> None:
    first, second = run_ranks(overfit_on_two, 2, 13)

    assert first == second
    assert first[0] == 26


# ---- modes ---------------------------------------------------------------------------------------


class Modes:
    """Notes in which mode the BatchNorm is in steps and after validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def step(self, run: Any, batch: Any) -> Tensor:
        self.seen.append((self.net[1].training, self.net[3].training))
        return F.cross_entropy(run.model(batch[0]), batch[1])

    def train(self, net: Any) -> Any:
        self.net = net
        make_trainer(max_epochs=2).fit(
            net, make_loader(), make_loader(5), step=self.step,
            optimizer=arguments()["optimizer"],
            eval_step=lambda run, batch: (run.model(batch[0]), batch[1]),
        )  # fmt: skip
        return self


def test_a_frozen_batchnorm_stays_frozen_and_the_rest_trains() -> None:
    net = make_net()
    net[1].eval()
    before = net[1].running_mean.clone()

    modes = Modes().train(net)

    assert set(modes.seen) == {(False, True)}
    assert torch.equal(before, net[1].running_mean)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_given_whole_in_one_mode_is_trained_whole(training: bool) -> None:
    net = make_net().train(training)

    assert set(Modes().train(net).seen) == {(True, True)}


def test_a_frozen_layer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net()
    net[1].eval()
    extras().fit(net, make_loader(), **arguments())

    assert "in evaluation while training, as given: 1\n" in capsys.readouterr().out


def frozen_on_two() -> tuple[bool, Tensor]:
    net = make_net()
    net[1].eval()
    settings = {"strategy": "ddp", "data": of_dataset()}
    fit(net, make_data(), make_data(5), settings=settings)
    return net[1].training, net[1].running_mean


def test_two_processes_keep_a_frozen_batchnorm() -> None:
    for training, mean in run_ranks(frozen_on_two, 2):
        assert not training
        assert torch.equal(mean, torch.zeros(16))


# ---- what is logged ------------------------------------------------------------------------------


def test_an_own_loop_left_early_logs_its_last_losses() -> None:
    logger, losses = Kept(), []
    trainer = extras(logger=[logger], log_every_n_steps=2)
    with trainer.prepare(make_model(), make_loader(), **arguments()) as run:
        for place, (inputs, targets) in enumerate(run.batches()):
            loss = run.loss(run.model(inputs), targets)
            run.backward(loss)
            run.step()
            losses.append(loss.item())
            if place == 4:
                break

    assert logger.rows[-1]["train_loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert len(logger.rows) == 3
    assert run.progress.samples == 20


class Returning(nn.Module):
    """Returns its loss with a further scalar and with what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        logits = self.net(inputs)
        return {
            "loss": F.cross_entropy(logits, targets), "logits": logits,
            "entropy": -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean(),
        }  # fmt: skip


def test_scalars_that_a_model_returns_beside_its_loss_are_logged() -> None:
    result = make_trainer().fit(Returning(), make_loader(), optimizer=arguments()["optimizer"])

    assert 0 < result.metrics["entropy"] < 1.2
    assert "logits" not in result.metrics


def test_csv_and_tensorboard_together(tmp_path: Path) -> None:
    result = extras(logger=["csv", "tensorboard"], default_root_dir=tmp_path, max_epochs=2).fit(
        make_model(), make_loader(), make_loader(5), hparams={"width": 8}, **arguments()
    )

    assert result.directory is not None
    rows = list(csv.DictReader((result.directory / "metrics.csv").read_text("utf-8").splitlines()))
    assert [row["step"] for row in rows] == ["6", "12"]
    assert float(rows[-1]["val_loss"]) == pytest.approx(result.metrics["val_loss"])
    assert json.loads((result.directory / "hparams.json").read_text("utf-8")) == {"width": 8}
    assert list(result.directory.glob("events.out.tfevents.*"))


def test_a_csv_gets_a_column_for_a_metric_that_comes_later(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"a": 2.0, "b": 3.0}, step=2)
    logger.log_metrics({"b": 4.0}, step=3)

    assert logger.path.read_text("utf-8").splitlines() == [
        "step,a,b", "1,1.0,", "2,2.0,3.0", "3,,4.0",
    ]  # fmt: skip


def test_loggers_of_the_users_own_directory(tmp_path: Path) -> None:
    own = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]

    extras(logger=own).fit(make_model(), make_loader(), **arguments())

    assert (tmp_path / "csv" / "metrics.csv").exists()
    assert list((tmp_path / "tb").iterdir())


# ---- ranks with different amounts of data --------------------------------------------------------


class Part(IterableDataset[Any]):
    """A stream without a length that gives each rank its own part: 10 samples, and 17."""

    def __iter__(self) -> Iterator[Any]:
        inputs, targets = make_data(27).tensors
        here = slice(0, 10) if dist.get_rank() == 0 else slice(10, 27)
        return iter(list(zip(inputs[here], targets[here], strict=True)))


def train_on_parts() -> tuple[list[Tensor], int, dict[str, float], list[Tensor]]:
    seen: list[Tensor] = []

    def step(run: Any, batch: Any) -> Tensor:
        seen.append(batch[0])
        return F.cross_entropy(run.model(batch[0]), batch[1])

    model = make_model()
    settings: dict[str, Any] = {
        "strategy": "ddp", "data": of_dataset(sharded=True), "max_steps": 4,
        "accumulate_grad_batches": 2,
    }  # fmt: skip
    trainer = make_trainer(**settings)
    result = trainer.fit(model, Part(), step=step, optimizer=arguments()["optimizer"])
    found = trainer.evaluate(
        model, Part(), loss=F.cross_entropy,
        eval_step=lambda run, batch: (run.model(batch[0]), batch[1]),
    )  # fmt: skip
    return seen, result.progress.samples, found, list(model.state_dict().values())


def test_two_processes_read_streams_of_different_lengths_to_the_end() -> None:
    first, second = run_ranks(train_on_parts, 2)

    inputs, targets = make_data(27).tensors
    for answer, mine in ((first, inputs[:10]), (second, inputs[10:])):
        epochs = [batch for _ in range(3) for batch in mine.split(BATCH)]
        assert all(torch.equal(a, b) for a, b in zip(answer[0], epochs[:8], strict=True))
    samples = sum(len(batch) for answer in (first, second) for batch in answer[0])
    assert first[1] == second[1] == samples
    model = make_model()
    model.load_state_dict(dict(zip(model.state_dict(), first[3], strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(first[3], second[3], strict=True))
    expected = F.cross_entropy(model(inputs), targets).item()
    assert first[2]["loss"] == second[2]["loss"] == pytest.approx(expected, rel=1e-6)

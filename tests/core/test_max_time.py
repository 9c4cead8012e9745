"""max_time=: the run ends when it is used up, is saved, and a resumed one counts on."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from tests.core.trainings import arguments, make_loader, make_model, make_trainer
from torchweld.callbacks import Timer
from torchweld.errors import InvalidArgument
from torchweld.interfaces import Progress
from torchweld.testing import run_ranks


@pytest.mark.parametrize(
    "asked",
    [
        "01:02:03:04",
        timedelta(days=1, hours=2, minutes=3, seconds=4),
        {"hours": 26, "seconds": 184},
    ],
)
def test_a_duration_is_read_as_lightning_reads_it(asked: Any) -> None:
    (timer,) = make_trainer(max_time=asked)._config.extras.callbacks

    assert timer.duration == timedelta(days=1, hours=2, minutes=3, seconds=4)


@pytest.mark.parametrize("asked", ["10:00", "soon", {"hour": 1}, 90, "00:00:00:00", True])
def test_no_duration_is_refused(asked: Any) -> None:
    with pytest.raises(InvalidArgument, match="give 'DD:HH:MM:SS'"):
        make_trainer(max_time=asked)


def slow_loss(outputs: Tensor, targets: Tensor, seconds: float = 0.05) -> Tensor:
    time.sleep(seconds)
    return F.cross_entropy(outputs, targets)


def test_a_run_ends_inside_an_epoch_is_saved_and_counts_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet: dict[str, Any] = {
        "barebones": False, "logger": False, "enable_progress_bar": False,
        "default_root_dir": tmp_path, "max_epochs": 500,
    }  # fmt: skip
    given = arguments(loss=slow_loss)
    first = make_trainer(max_time={"seconds": 0.5}, **quiet).fit(
        make_model(), make_loader(), **given
    )
    said = capsys.readouterr().out
    again = make_trainer(max_time={"seconds": 0.5}, **quiet).fit(
        make_model(), make_loader(), ckpt_path="last", **given
    )

    assert 1 <= first.progress.step <= 12  # at 0.05 s a step; slower on a busy machine
    assert first.checkpoint is not None
    assert first.checkpoint.name == f"step-{first.progress.step}"
    assert "max_time=0:00:00.500000 is used up" in said
    assert again.progress.step == first.progress.step + 1  # one step tells that nothing is left


def test_a_run_with_nothing_left_keeps_the_time_that_was_used(tmp_path: Path) -> None:
    fit = partial(
        make_trainer(
            max_time={"hours": 1}, barebones=False, logger=False, enable_progress_bar=False,
            default_root_dir=tmp_path, max_epochs=1,
        ).fit, make_model(), make_loader(), **arguments(loss=slow_loss),
    )  # fmt: skip
    fit()
    timer = Timer(timedelta(hours=1))
    again = make_trainer(
        callbacks=[timer], barebones=False, logger=False, enable_progress_bar=False,
        default_root_dir=tmp_path, max_epochs=1,
    )  # fmt: skip
    again.fit(make_model(), make_loader(), ckpt_path="last", **arguments(loss=slow_loss))
    used = timer.time_elapsed()
    again.fit(make_model(), make_loader(), **arguments(loss=slow_loss))

    assert used > 0.05  # at the least a step's; it was 0 when the first run's time was lost
    assert timer.state_dict()["time_elapsed"] - timer._before > 0
    assert timer._before == 0  # a run that goes on from nothing begins at nothing


def test_two_limits_of_time_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="a run has one limit of time"):
        make_trainer(barebones=False, callbacks=[Timer(timedelta(days=1))], max_time={"seconds": 1})


def test_the_pace_of_the_last_steps_tells_the_next_border() -> None:
    timer = Timer(timedelta(seconds=100))

    before = timer.next_due(Progress(step=0))
    used_up = timer.agree(2.0, step=1)

    assert (before, used_up, timer.next_due(Progress(step=1))) == (1, False, 50)
    assert timer.agree(100.0, step=50)


def train_unevenly(seconds_by_rank: tuple[float, ...]) -> int:
    import os

    seconds = seconds_by_rank[int(os.environ["RANK"])]
    result = make_trainer(
        strategy="ddp", max_time={"seconds": 0.4}, max_steps=2000
    ).fit(
        make_model(), make_loader(240), loss=partial(slow_loss, seconds=seconds),
        optimizer=partial(SGD, lr=0.1),
    )  # fmt: skip
    return result.progress.step


def test_ranks_that_are_not_equally_fast_end_at_the_same_step() -> None:
    steps = run_ranks(train_unevenly, 2, (0.0, 0.04))

    assert steps[0] == steps[1] < 60

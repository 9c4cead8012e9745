"""Which checkpoints are compared by a metric, and which are kept over several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.core.trainings import arguments, make_loader, make_model, make_trainer
from torchweld import ModelCheckpoint
from torchweld.checkpoint import Checkpoint
from torchweld.interfaces import Border, Result, Run

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 6  # an epoch


class Scripted:
    """Gives these values as the metric ``val_score``, one a validation."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values, self._value = iter(values), 0.0

    def at(self, border: Border, run: Run) -> None:
        if "eval_start" in border.kind:
            self._value = next(self._values)

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        return self._value * len(targets), len(targets)


def train(root: Path, saver: ModelCheckpoint, values: Sequence[float], **settings: Any) -> Result:
    script = Scripted(values)
    given = {
        "default_root_dir": root, "barebones": False, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [*settings.pop("beside", []), script, saver],
    }  # fmt: skip
    more = {name: settings.pop(name) for name in ("ckpt_path",) if name in settings}
    return make_trainer(**given, **settings).fit(
        make_model(), make_loader(), make_loader(8), metrics={"score": script.measure},
        **arguments(**more),
    )  # fmt: skip


def saved(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("*/step-*"))


def keep(**options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(monitor="val_score", **options)


# ---- only what was measured at its step ----------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_between_validations_has_no_score(asynchronous: bool, tmp_path: Path) -> None:
    saver = keep(every_n_train_steps=2, save_top_k=1, async_save=asynchronous)

    result = train(tmp_path, saver, [0.2, 0.5], max_epochs=2)

    assert saved(tmp_path) == [6, 12]
    assert (saver.best_score, result.best_checkpoint) == (0.2, saver.best)
    assert saver.best is not None
    assert saver.best.name == "step-6"


def test_best_is_looked_for_among_those_with_a_score(tmp_path: Path) -> None:
    train(tmp_path, keep(every_n_train_steps=2, save_top_k=-1), [0.2, 0.5], max_epochs=2)
    headers = {int(p.name[5:]): Checkpoint.open(p).header for p in tmp_path.glob("*/step-*")}

    saver = keep(save_top_k=-1)
    resumed = train(tmp_path, saver, [0.4], max_epochs=2, ckpt_path="best")

    scores = {step: header["metrics"].get("val_score") for step, header in headers.items()}
    assert scores == {2: None, 4: None, 6: 0.2, 8: None, 10: None, 12: 0.5}
    assert resumed.progress.step == 2 * STEPS
    assert saver.best_score == 0.4  # trained from step 6, not from a later one with its score


def test_each_validation_inside_an_epoch_may_be_the_best(tmp_path: Path) -> None:
    saver = keep(save_top_k=1)

    train(tmp_path, saver, [0.6, 0.1, 0.4, 0.5, 0.3, 0.7], max_epochs=2, val_check_interval=2)

    assert saved(tmp_path) == [4, 12]
    assert saver.best_score == 0.1


def test_every_other_epoch_leaves_validations_between_out(tmp_path: Path) -> None:
    saver = keep(save_top_k=-1, every_n_epochs=2)

    train(tmp_path, saver, [0.6, 0.1, 0.4, 0.5, 0.3, 0.7], max_epochs=2, val_check_interval=2)

    assert saved(tmp_path) == [8, 10, 12]


def test_the_last_one_gets_the_score_of_the_validation_at_the_end(tmp_path: Path) -> None:
    saver = keep(save_top_k=1)

    train(tmp_path, saver, [0.4, 0.3], max_epochs=3, check_val_every_n_epoch=2)

    assert saved(tmp_path) == [18]
    assert saver.best_score == 0.3
    assert Checkpoint.open(saver.best).header["metrics"]["val_score"] == 0.3  # type: ignore[arg-type]  # not None


# ---- over several runs ---------------------------------------------------------------------------


class SavesByHand:
    """Saves at one step itself."""

    def next_due(self, progress: Any) -> int | None:
        return 3 if progress.step < 3 else None

    def at(self, border: Border, run: Run) -> None:
        if border.progress.step == 3:
            run.save()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_goes_on_keeps_and_removes_what_the_runs_before_kept(
    asynchronous: bool, tmp_path: Path
) -> None:
    def go_on(epochs: int, value: float, **more: Any) -> tuple[Result, list[int]]:
        saver = keep(save_top_k=1, async_save=asynchronous)
        result = train(tmp_path, saver, [value], max_epochs=epochs, **more)
        return result, saved(tmp_path)

    first = keep(save_top_k=1, async_save=asynchronous)
    train(tmp_path, first, [0.1, 0.5], max_epochs=2, beside=[SavesByHand()])
    assert saved(tmp_path) == [3, 6, 12]

    second, after_second = go_on(3, 0.3, ckpt_path="last")
    _, after_third = go_on(4, 0.2, ckpt_path="last")
    fourth, after_fourth = go_on(5, 0.05, ckpt_path="last")

    assert after_second == [3, 6, 18]
    assert second.best_checkpoint == first.best
    assert after_third == [3, 6, 24]
    assert after_fourth == [3, 30]  # what was saved by hand is never removed
    assert fourth.best_checkpoint == fourth.checkpoint


def test_a_run_that_starts_from_a_path_leaves_the_other_runs_files_alone(tmp_path: Path) -> None:
    first = keep(save_top_k=1)
    train(tmp_path, first, [0.1, 0.5], max_epochs=2)
    saver = keep(save_top_k=1)

    result = train(tmp_path, saver, [0.3], max_epochs=3, ckpt_path=first.last)
    again = train(tmp_path, saver, [0.6], max_epochs=1)

    assert saved(tmp_path) == [6, 6, 12, 18]
    assert result.best_checkpoint == result.checkpoint
    assert again.best_checkpoint == again.checkpoint


def test_a_run_with_nothing_left_to_do_hands_nothing_on_to_the_next(tmp_path: Path) -> None:
    train(tmp_path, keep(save_top_k=1), [0.1], max_epochs=1)
    saver = keep(save_top_k=1)

    train(tmp_path, saver, [0.3], max_epochs=1, ckpt_path="last")
    other = train(tmp_path, saver, [0.4], max_epochs=1)

    assert other.best_checkpoint == other.checkpoint
    assert saver.best_score == 0.4

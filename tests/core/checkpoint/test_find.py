"""The newest intact checkpoint of the right model is found; others are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchweld.checkpoint import Skipped, best, complete, find, last, prune, remove, write
from torchweld.errors import CheckpointError, InvalidArgument
from torchweld.interfaces import Shard


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass between two checkpoints."""
    ticks: Iterator[int] = iter(range(10**9, 10**9 + 100))
    monkeypatch.setattr("torchweld.checkpoint.writer.time.time", lambda: float(next(ticks)))


def save(path: Path, **header: Any) -> Path:
    shard = Shard("model/w", torch.ones(1000), (1000,), (0,))
    return write(path, shards=[shard], header={"model_digest": "aa", **header})


def damage(path: Path) -> None:
    data = bytearray((path / "00000.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "00000.safetensors").write_bytes(data)


def test_complete_lists_the_newest_first_across_runs(tmp_path: Path) -> None:
    one = save(tmp_path / "run-b" / "step-10")
    two = save(tmp_path / "run-a" / "step-5")
    three = save(tmp_path / "run-b" / "step-9")

    assert complete(tmp_path) == [three, two, one]
    assert complete(tmp_path / "run-b") == [three, one]


def test_complete_leaves_out_what_is_not_complete(tmp_path: Path) -> None:
    good = save(tmp_path / "run" / "step-1")
    half = save(tmp_path / "run" / "step-2")
    (half / "manifest.json").unlink()
    save(tmp_path / "run" / "step-3").rename(tmp_path / "run" / ".step-3.part")

    assert complete(tmp_path) == [good]


def test_complete_is_empty_where_nothing_is(tmp_path: Path) -> None:
    assert complete(tmp_path / "nowhere") == []


def test_last_takes_the_newest(tmp_path: Path) -> None:
    save(tmp_path / "run" / "step-1")
    newest = save(tmp_path / "run" / "step-2")

    assert last(tmp_path, "aa") == (newest, [])


def test_last_names_damaged_ones_and_takes_the_previous(tmp_path: Path) -> None:
    good = save(tmp_path / "run" / "step-1")
    flipped, removed = save(tmp_path / "run" / "step-2"), save(tmp_path / "run" / "step-3")
    damage(flipped)
    (removed / "00000.json").unlink()

    assert last(tmp_path) == (
        good,
        [
            Skipped(removed, "00000.json: missing"),
            Skipped(flipped, "00000.safetensors: changed since it was written (another sha256)"),
        ],
    )


def test_last_names_one_without_a_manifest(tmp_path: Path) -> None:
    good, half = save(tmp_path / "run" / "step-1"), save(tmp_path / "run" / "step-2")
    (half / "manifest.json").unlink()

    found, skipped = last(tmp_path)

    assert found == good
    assert [(one.path, "manifest.json" in one.reason) for one in skipped] == [(half, True)]


def test_last_skips_another_model(tmp_path: Path) -> None:
    good = save(tmp_path / "run" / "step-1")
    other = save(tmp_path / "run" / "step-2", model_digest="bb")

    assert last(tmp_path, "aa") == (
        good,
        [Skipped(other, "it is of another model (digest bb, this model has aa)")],
    )


def test_last_is_none_where_nothing_is_intact(tmp_path: Path) -> None:
    damage(save(tmp_path / "run" / "step-1"))

    found, skipped = last(tmp_path)

    assert found is None
    assert len(skipped) == 1


def test_best_follows_the_mode(tmp_path: Path) -> None:
    low = save(tmp_path / "run" / "step-1", metrics={"val_accuracy": 0.5})
    high = save(tmp_path / "run" / "step-2", metrics={"val_accuracy": 0.9})

    assert best(tmp_path, "val_accuracy", "max") == (high, [])
    assert best(tmp_path, "val_accuracy", "min") == (low, [])


def test_best_takes_the_newest_of_equals(tmp_path: Path) -> None:
    save(tmp_path / "run" / "step-1", metrics={"val_loss": 0.5})
    newest = save(tmp_path / "run" / "step-2", metrics={"val_loss": 0.5})
    save(tmp_path / "run" / "step-3", metrics={"loss": 0.1})

    assert best(tmp_path, "val_loss", "min") == (newest, [])


def test_best_names_a_damaged_better_one(tmp_path: Path) -> None:
    good = save(tmp_path / "run" / "step-1", metrics={"val_loss": 0.5})
    better = save(tmp_path / "run" / "step-2", metrics={"val_loss": 0.1})
    damage(better)

    found, skipped = best(tmp_path, "val_loss", "min")

    assert found == good
    assert [one.path for one in skipped] == [better]


def test_best_refuses_an_unknown_mode(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'lowest'"):
        best(tmp_path, "val_loss", "lowest")  # type: ignore[arg-type]  # what is tested


def test_prune_keeps_the_first(tmp_path: Path) -> None:
    paths = [save(tmp_path / "run" / f"step-{number}") for number in range(4)]

    removed = prune(paths, keep=2)

    assert removed == paths[2:]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-0", "step-1"]


def test_remove_takes_the_name_first_and_ctrl_c_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "run" / "step-1")
    seen: list[list[str]] = []

    def interrupted(run: Path) -> None:
        seen.append([left.name for left in run.iterdir()])
        raise KeyboardInterrupt

    monkeypatch.setattr(find, "sync_directory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(path)

    assert seen == [[".step-1.part"]]
    assert list((tmp_path / "run").iterdir()) == []


def test_remove_takes_what_a_killed_replacement_left_along(tmp_path: Path) -> None:
    save(tmp_path / "run" / "step-1").rename(tmp_path / "run" / ".step-1.old")
    path = save(tmp_path / "elsewhere" / "step-1").rename(tmp_path / "run" / "step-1")

    remove(path)

    assert complete(tmp_path) == []


def test_remove_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()

    with pytest.raises(CheckpointError, match="no checkpoint"):
        remove(tmp_path / "thesis")

    assert (tmp_path / "thesis").is_dir()

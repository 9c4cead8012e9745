"""What ``torchweld inspect`` shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchweld.checkpoint import describe, encode, inspect, write
from torchweld.errors import CheckpointError
from torchweld.interfaces import Shard

PLAN = {
    "digest": "7c41e0" + "0" * 58,
    "order": [{"phase": "surgery", "name": "blurpool"}, {"phase": "strategy", "name": "ddp"}],
}


def save(path: Path, step: int = 90) -> Path:
    groups, _ = encode(
        [{"names": ["w", "b"], "lr": 0.1, "betas": (0.9, 0.99)}, {"names": [], "lr": 0.0}], "groups"
    )
    header = {
        "step": step,
        "epoch": 2,
        "samples": 5760,
        "plan": PLAN,
        "groups": groups,
        "metrics": {"val_accuracy": 0.871},
        "model_digest": "aa",
    }
    shards = [
        Shard("model/w", torch.zeros(500, 1000), (500, 1000), (0, 0)),
        Shard("optim/w/momentum_buffer", torch.zeros(500, 1000), (500, 1000), (0, 0)),
        Shard("optim/w/step", torch.tensor(3.0), (), ()),
    ]
    return write(path, shards=shards, header=header)


def test_describe_shows_what_resuming_needs(tmp_path: Path) -> None:
    text = describe(inspect(save(tmp_path / "step-90")))

    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1] == "step 90 epoch 2 5760 samples"
    assert lines[2].endswith("by 1 process")
    assert lines[3].startswith("versions torchweld ")
    assert lines[4:] == [
        "plan 7c41e0",
        "components surgery blurpool, strategy ddp",
        "metrics val_accuracy 0.871",
        "group 0 2 parameters lr 0.1 betas (0.9, 0.99)",
        "group 1 0 parameters lr 0",
        "model 1 tensors 2.0 MB",
        "optimizer 2 tensors 2.0 MB",
        "other 0 tensors 0 B",
        "files all intact",
    ]


def test_inspect_counts_tensors_by_kind(tmp_path: Path) -> None:
    report = inspect(save(tmp_path / "step-90"))

    assert report["tensors"]["optimizer"] == {"count": 2, "bytes": 2_000_004}
    assert (report["complete"], report["damage"], report["world_size"]) == (True, [], 1)


def test_describe_names_damaged_files(tmp_path: Path) -> None:
    path = save(tmp_path / "step-90")
    (path / "00000.safetensors").write_bytes(b"")

    text = describe(inspect(path))

    assert "00000.safetensors: truncated to 0 of" in text
    assert "all intact" not in text
    assert "step        90" in text


def test_describe_still_answers_without_an_index(tmp_path: Path) -> None:
    path = save(tmp_path / "step-90")
    (path / "00000.json").unlink()

    assert "00000.json: missing" in describe(inspect(path))


def test_describe_answers_for_an_incomplete_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "step-90")
    (path / "manifest.json").unlink()

    assert "manifest.json, which is written last, is missing" in describe(inspect(path))
    assert inspect(path)["complete"] is False


def test_describe_lists_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    save(tmp_path / "run" / "step-90", 90)
    damaged = save(tmp_path / "run" / "step-95", 95)
    (damaged / "00000.safetensors").unlink()

    newest, oldest = describe(inspect(tmp_path / "run")).splitlines()

    assert "step 95" in newest
    assert newest.endswith("damaged: 00000.safetensors: missing")
    assert "step 90" in oldest
    assert oldest.endswith("val_accuracy 0.871   intact")


def test_describe_lists_an_incomplete_checkpoint_of_a_run(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "step-90")
    (path / "manifest.json").unlink()

    assert describe(inspect(tmp_path / "run")).startswith(f"{path}   damaged: ")


def test_describe_says_when_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        describe(inspect(tmp_path))

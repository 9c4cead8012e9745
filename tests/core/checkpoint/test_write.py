"""A checkpoint is whole or not there, and every rank hears why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchweld.checkpoint import Checkpoint, complete, write
from torchweld.errors import CheckpointError
from torchweld.interfaces import Shard

Outcomes = Callable[..., list["Path | BaseException"]]

WEIGHT = torch.arange(12.0).view(3, 4)
SHARD = Shard("model/w", WEIGHT, (3, 4), (0, 0))


def messages(outcomes: list[Path | BaseException]) -> list[str]:
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes), outcomes
    return [str(outcome) for outcome in outcomes]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_write_leaves_the_checkpoint_alone_in_its_run(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "step-1", shards=[SHARD], header={})

    assert names(tmp_path / "run") == ["step-1"]
    assert names(path) == ["00000.json", "00000.safetensors", "manifest.json"]


def test_write_replaces_a_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    write(tmp_path / "step-1", shards=[SHARD], header={"step": 1})

    path = write(tmp_path / "step-1", shards=[], header={"step": 2})

    assert Checkpoint.open(path).manifest["step"] == 2
    assert names(tmp_path) == ["step-1"]


def test_write_keeps_the_old_checkpoint_when_the_new_one_fails(tmp_path: Path) -> None:
    path = write(tmp_path / "step-1", shards=[SHARD], header={"step": 1})

    with pytest.raises(CheckpointError):
        write(path, shards=[SHARD, SHARD], header={"step": 2})

    assert Checkpoint.open(path).manifest["step"] == 1
    assert names(tmp_path) == ["step-1"]


def test_write_puts_the_old_checkpoint_back_when_the_new_name_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "step-1", shards=[SHARD], header={"step": 1})
    rename = Path.rename

    def fail_for_the_new(source: Path, target: Path) -> Path:
        if source.name.endswith(".part"):
            raise OSError("no space for a name")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(CheckpointError, match="no space for a name"):
        write(path, shards=[SHARD], header={"step": 2})

    assert Checkpoint.open(path).manifest["step"] == 1
    assert names(tmp_path) == ["step-1"]


def test_write_removes_what_an_interrupted_write_left(tmp_path: Path) -> None:
    part = tmp_path / ".step-1.part"
    part.mkdir()
    (part / "00000.safetensors").write_bytes(b"half")

    path = write(tmp_path / "step-1", shards=[SHARD], header={})

    assert torch.equal(Checkpoint.open(path).tensor("model/w"), WEIGHT)
    assert names(tmp_path) == ["step-1"]


def test_write_never_replaces_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("irreplaceable")

    with pytest.raises(CheckpointError, match="is no checkpoint"):
        write(tmp_path / "home", shards=[SHARD], header={})

    assert names(tmp_path / "home") == ["thesis.tex"]


def test_interrupted_replacement_leaves_a_checkpoint_to_find(tmp_path: Path) -> None:
    write(tmp_path / "step-1", shards=[SHARD], header={})
    (tmp_path / "step-1").rename(tmp_path / ".step-1.old")

    assert complete(tmp_path) == [tmp_path / ".step-1.old"]


@pytest.mark.parametrize(
    ("shards", "what"),
    [
        ([SHARD, SHARD], "'model/w' is given twice"),
        (
            [Shard("w", torch.zeros(2, 4), (3, 4), (0, 0)), Shard("w", torch.zeros(5), (3, 4), 7)],
            "overlap",
        ),
        (
            [
                Shard("w", torch.zeros(2, 2), (3, 4), (0, 0)),
                Shard("w", torch.zeros(2, 2), (3, 4), (1, 1)),
            ],
            "overlap",
        ),
        ([Shard("w", torch.zeros(2, 4), (3, 4), (2, 0))], "not inside a tensor of shape"),
        ([Shard("w", torch.zeros(4), (3, 4), (0, 0))], "not inside a tensor of shape"),
        ([Shard("w", torch.zeros(4), (3, 4), 10)], "not inside a tensor of shape"),
        ([Shard("w", torch.zeros(4), (3, 4), -1)], "not inside a tensor of shape"),
        ([Shard("w", torch.zeros(3).to_sparse(), (3,), (0,))], "plain dense tensor"),
        ([Shard("w", torch.zeros(3, device="meta"), (3,), (0,))], "plain dense tensor"),
        ([Shard("__metadata__", torch.zeros(3), (3,), (0,))], "cannot be called"),
        ([Shard("w", torch.zeros(2), (3,), (0,))], "only 2 of 3 values"),
    ],
    ids=str,
)
def test_write_refuses_pieces_that_cannot_come_back(
    tmp_path: Path, shards: list[Shard], what: str
) -> None:
    with pytest.raises(CheckpointError, match=what):
        write(tmp_path / "step-1", shards=shards, header={})

    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ({"groups": [{"betas": (0.9, 0.99)}]}, r"header\['groups'\]\[0\]\['betas'\] is \(0.9"),
        ({"milestones": {30: 1}}, r"header\['milestones'\] is \{30: 1\}"),
        ({"best": float("nan")}, r"header\['best'\] is nan"),
        ({"step": torch.tensor(1)}, "of type Tensor"),
    ],
)
def test_write_refuses_a_header_that_json_would_change(
    tmp_path: Path, header: dict[str, Any], what: str
) -> None:
    with pytest.raises(CheckpointError, match=what):
        write(tmp_path / "step-1", shards=[], header=header)


def test_all_ranks_hear_which_rank_failed(tmp_path: Path, outcomes: Outcomes) -> None:
    def broken() -> Iterator[Shard]:
        raise RuntimeError("device lost")
        yield

    found = outcomes(tmp_path / "step-1", [[SHARD], broken()])

    assert [message.count("rank 1: RuntimeError: device lost") for message in messages(found)] == [
        1,
        1,
    ]
    assert names(tmp_path) == []


def test_pieces_of_two_ranks_that_overlap_are_refused(tmp_path: Path, outcomes: Outcomes) -> None:
    found = outcomes(tmp_path / "step-1", [[SHARD], [SHARD]])

    assert all("'model/w': the box [3, 4] at [0, 0]" in message for message in messages(found))
    assert names(tmp_path) == []


def test_ranks_that_disagree_on_a_shape_are_refused(tmp_path: Path, outcomes: Outcomes) -> None:
    one = Shard("w", torch.zeros(2), (4,), (0,))
    other = Shard("w", torch.zeros(2), (5,), (2,))

    found = outcomes(tmp_path / "step-1", [[one], [other]])

    assert all("tensors of shapes [[4], [5]]" in message for message in messages(found))


def test_ranks_that_disagree_on_a_dtype_are_refused(tmp_path: Path, outcomes: Outcomes) -> None:
    one = Shard("w", torch.zeros(2), (4,), (0,))
    other = Shard("w", torch.zeros(2).half(), (4,), (2,))

    found = outcomes(tmp_path / "step-1", [[one], [other]])

    assert all("'w' is ['float16', 'float32']" in message for message in messages(found))


def test_rank_without_the_shared_folder_is_named(tmp_path: Path) -> None:
    def exchange(label: str, text: str) -> list[str]:
        other = '{"done": {"bytes": 10, "sha256": "00"}}' if label.endswith("written") else text
        return [text, other]

    with pytest.raises(CheckpointError, match=r"files of rank 1 are not in .* share"):
        write(tmp_path / "step-1", world_size=2, exchange=exchange, shards=[SHARD], header={})


def test_ranks_with_different_names_are_refused(tmp_path: Path) -> None:
    def exchange(label: str, text: str) -> list[str]:
        return [text, '{"done": "step-2"}']

    with pytest.raises(CheckpointError, match=r"\['step-1', 'step-2'\]"):
        write(tmp_path / "step-1", world_size=2, exchange=exchange, shards=[], header={})


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    def interrupted(label: str, text: str) -> list[str]:
        if label.endswith("written"):
            raise KeyboardInterrupt
        return [text]

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "step-1", exchange=interrupted, shards=[SHARD], header={})

    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of open files from /proc")
def test_everything_is_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        calls.append(f"{path.name} -> {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    write(tmp_path / "run" / "step-1", shards=[SHARD], header={})

    assert calls == [
        tmp_path.name,
        "00000.safetensors",
        "00000.json",
        "manifest.json",
        ".step-1.part",
        ".step-1.part -> step-1",
        "run",
    ]


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
import torch
from torchweld.checkpoint import write
from torchweld.interfaces import Shard
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
shard = Shard("model/w", torch.zeros(100_000), (100_000,), (0,))
write(Path(sys.argv[1]), shards=[shard], header={})
"""

    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "step-1")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert "CheckpointError" in ended.stderr
    assert "rank 0: OSError: [Errno 27] File too large" in ended.stderr
    assert names(tmp_path) == []


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run's directory should be")

    with pytest.raises(CheckpointError, match=r"rank 0: \w+: .*run"):
        write(tmp_path / "run" / "step-1", shards=[SHARD], header={})


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_write_needs_memory_for_the_largest_piece_only(tmp_path: Path) -> None:
    # Views of one element: none of the four times 40 MB exists before its turn.
    element = torch.zeros(1)
    pieces = [Shard(f"w{n}", element.expand(10_000_000), (10_000_000,), (0,)) for n in range(4)]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    before = peak_mb()

    write(tmp_path / "step-1", shards=pieces, header={})

    assert peak_mb() - before < 70


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000

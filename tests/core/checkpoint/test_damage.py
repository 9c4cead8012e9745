"""Damage is named, asked-for things that are not there are errors, and pickle never runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchweld.checkpoint import (
    Checkpoint,
    describe,
    export_weights,
    find_damage,
    inspect,
    last,
    load_weights,
    write,
)
from torchweld.checkpoint.format import seal_manifest
from torchweld.errors import CheckpointDamaged, CheckpointError
from torchweld.interfaces import Shard

FILES = ["manifest.json", "00000.json", "00000.safetensors", "00001.json", "00001.safetensors"]


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture
def path(tmp_path: Path, save: Callable[..., list[Path]]) -> Path:
    """A checkpoint of two ranks."""
    weight = torch.arange(1000.0).view(100, 10)
    shards = [[Shard("model/w", weight[i : i + 50], (100, 10), (i, 0))] for i in (0, 50)]
    saved: Path = save(tmp_path / "run" / "step-1", shards, header={"step": 1})[0]
    return saved


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "harm",
    [Path.unlink, truncate, lambda path: flip_a_bit(path, 200), lambda path: path.write_bytes(b"")],
    ids=["removed", "truncated", "bit flipped", "empty"],
)
def test_open_names_the_damaged_file(path: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(path / name)

    with pytest.raises(CheckpointDamaged, match=name):
        Checkpoint.open(path)


@pytest.mark.parametrize("place", range(0, 900, 31))
def test_open_finds_a_flipped_bit_anywhere_in_the_manifest(path: Path, place: int) -> None:
    flip_a_bit(path / "manifest.json", place)

    with pytest.raises(CheckpointDamaged, match=r"manifest\.json"):
        Checkpoint.open(path)


def test_open_names_every_damaged_file(path: Path) -> None:
    (path / "00000.safetensors").unlink()
    truncate(path / "00001.safetensors")
    size = (path / "00001.safetensors").stat().st_size

    assert find_damage(path) == [
        "00000.safetensors: missing",
        f"00001.safetensors: truncated to {size} of {2 * size} bytes",
    ]


def test_open_without_verify_still_finds_a_truncated_file(path: Path) -> None:
    truncate(path / "00001.safetensors")

    with pytest.raises(CheckpointDamaged, match="truncated"):
        Checkpoint.open(path, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_open_finds_an_index_that_is_other_json(path: Path, verify: bool) -> None:
    text = (path / "00001.json").read_text()
    (path / "00001.json").write_text(text.replace('"start":[50,0]', '"start":[49,0]'))

    with pytest.raises(CheckpointDamaged, match=r"00001\.json: changed since it was written"):
        Checkpoint.open(path, verify=verify)


def test_open_without_a_manifest_says_incomplete(path: Path) -> None:
    (path / "manifest.json").unlink()

    with pytest.raises(CheckpointDamaged, match="no complete checkpoint"):
        Checkpoint.open(path)


def test_open_says_when_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint.open(tmp_path / "step-7")


def test_open_says_when_the_format_is_newer(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    newer = seal_manifest({**manifest, "format": 2, "torchweld": "9.1"})
    (path / "manifest.json").write_text(json.dumps(newer))

    with pytest.raises(CheckpointError, match=r"format 2, this torchweld reads 1.*9\.1"):
        Checkpoint.open(path)


def test_fill_names_both_dtypes(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has float32, asked for bfloat16: .*init_weights="):
        Checkpoint.open(path).fill("model/w", torch.zeros(100, 10, dtype=torch.bfloat16), (0, 0))


@pytest.mark.parametrize(
    ("shape", "start"),
    [
        ((100, 11), (0, 0)),
        ((101, 10), (0, 0)),
        ((50, 10), (51, 0)),
        ((10,), (0,)),
        ((10,), 991),
        ((10,), -1),
    ],
)
def test_fill_refuses_another_shape(
    path: Path, shape: tuple[int, ...], start: int | tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError, match=r"model/w: asked for the .* has shape \[100, 10\]"):
        Checkpoint.open(path).fill("model/w", torch.zeros(shape), start)


def test_unknown_tensor_gets_the_nearest_name(path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'model/w'"):
        Checkpoint.open(path).info("model/W")


def test_file_that_does_not_hold_what_its_index_says_is_named(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    other = write(
        path.with_name("step-2"),
        shards=[Shard("model/w", torch.zeros(10), (10,), (0,))],
        header={},
    )

    (other / "00000.safetensors").rename(path / "00000.safetensors")

    with pytest.raises(CheckpointDamaged, match=r"00000\.safetensors: 'model/w'"):
        checkpoint.tensor("model/w")


class Exploit:
    """Pickles to a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._trace,)


def forbid_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("pickle was read")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)


def test_nothing_here_reads_pickle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_pickle(monkeypatch)

    checkpoint = Checkpoint.open(path)
    exported = export_weights(checkpoint, path.parent / "w.safetensors")

    assert last(path.parent) == (path, [])
    assert "all intact" in describe(inspect(path))
    assert torch.equal(load_weights(exported)["w"], checkpoint.tensor("model/w"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", [True, False])
def test_pickle_under_the_name_of_a_file_is_not_run(path: Path, name: str, verify: bool) -> None:
    trace = path.with_name("trace")
    size = (path / name).stat().st_size
    (path / name).write_bytes(pickle.dumps(Exploit(trace)).ljust(size, b"\0"))

    with pytest.raises(CheckpointDamaged, match=name):
        Checkpoint.open(path, verify=verify).tensor("model/w")

    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".weights"])
def test_pickled_weights_are_not_run(tmp_path: Path, suffix: str) -> None:
    trace, source = tmp_path / "trace", tmp_path / f"w{suffix}"
    torch.save(Exploit(trace), source)

    with pytest.raises(CheckpointError):
        load_weights(source)

    assert not trace.exists()


def test_index_that_points_elsewhere_is_not_followed(path: Path) -> None:
    index = json.loads((path / "00000.json").read_text())
    index["pieces"][0]["start"] = [0, "../../etc/passwd"]
    (path / "00000.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointDamaged, match=r"00000\.json"):
        Checkpoint.open(path)


def test_header_longer_than_its_file_is_damage(tmp_path: Path) -> None:
    source = tmp_path / "w.safetensors"
    source.write_bytes(struct.pack("<Q", 2**40) + b"{}")

    with pytest.raises(CheckpointError, match="no intact safetensors file"):
        load_weights(source)

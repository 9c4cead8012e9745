"""Weights leave as one safetensors file and come back without pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from torchweld.checkpoint import Checkpoint, export_shards, export_weights, load_weights, write
from torchweld.errors import CheckpointError
from torchweld.interfaces import Shard


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def model_shards(model: nn.Module) -> list[Shard]:
    return [
        Shard(f"model/{name}", value, tuple(value.shape), (0,) * value.ndim)
        for name, value in model.state_dict().items()
    ]


def assert_same(found: dict[str, torch.Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_export_of_a_checkpoint_loads_into_the_bare_model(tmp_path: Path) -> None:
    model = make_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub wants a dtype
    momentum = Shard("optim/0.weight/momentum_buffer", torch.zeros(3), (3,), (0,))
    path = write(tmp_path / "step-1", shards=[*model_shards(model), momentum], header={})

    exported = export_weights(Checkpoint.open(path), tmp_path / "out" / "w.safetensors")

    assert_same(load_weights(exported), model)
    make_model().load_state_dict(load_weights(exported), strict=True)


def test_export_of_live_shards_equals_export_of_a_checkpoint(tmp_path: Path) -> None:
    shards = model_shards(make_model())
    checkpoint = Checkpoint.open(write(tmp_path / "step-1", shards=shards, header={}))

    live = export_shards(shards, tmp_path / "live.safetensors", {"surgery": "blurpool"})
    saved = export_weights(checkpoint, tmp_path / "saved.safetensors", {"surgery": "blurpool"})

    assert live.read_bytes() == saved.read_bytes()


def test_export_joins_pieces_of_several_ranks(
    tmp_path: Path, save: Callable[..., list[Path]]
) -> None:
    weight = torch.randn(5, 3)
    flat = weight.view(-1)
    shards = [[Shard("model/w", flat[low:high], (5, 3), low)] for low, high in [(0, 7), (7, 15)]]
    path, *_ = save(tmp_path / "step-1", shards)

    of_checkpoint = export_weights(Checkpoint.open(path), tmp_path / "a.safetensors")
    of_shards = export_shards([*shards[0], *shards[1]], tmp_path / "b.safetensors")

    assert torch.equal(load_weights(of_checkpoint)["w"], weight)
    assert torch.equal(load_weights(of_shards)["w"], weight)


def test_export_of_live_shards_refuses_missing_pieces(tmp_path: Path) -> None:
    half = Shard("model/w", torch.zeros(2), (4,), (0,))

    with pytest.raises(CheckpointError, match="'model/w' cannot be exported from this rank alone"):
        export_shards([half], tmp_path / "w.safetensors")


def test_export_writes_metadata_into_the_header(tmp_path: Path) -> None:
    exported = export_shards(
        model_shards(make_model()), tmp_path / "w.safetensors", {"surgery": "blurpool"}
    )

    with safe_open(exported, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "surgery": "blurpool"}


def test_export_replaces_a_file_and_leaves_no_other(tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    target.write_text("the weights of yesterday")

    export_shards(model_shards(make_model()), target)

    assert_same(load_weights(target), make_model())
    assert list(tmp_path.iterdir()) == [target]


def test_export_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    target.write_text("the weights of yesterday")
    odd = Shard("model/w", torch.zeros(2, dtype=torch.complex128), (2,), (0,))

    with pytest.raises(CheckpointError, match="'w' has dtype complex128"):
        export_shards([odd], target)

    assert target.read_text() == "the weights of yesterday"


@pytest.mark.parametrize("dtype", [torch.uint32, torch.float8_e5m2, torch.bfloat16], ids=str)
def test_export_keeps_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.arange(4).to(dtype)
    checkpoint = Checkpoint.open(
        write(tmp_path / "step-1", shards=[Shard("model/w", weight, (4,), (0,))], header={})
    )

    found = load_weights(export_weights(checkpoint, tmp_path / "w.safetensors"))["w"]

    assert found.dtype == dtype
    assert found.tolist() == weight.tolist()


def test_export_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to export"):
        export_shards([], tmp_path / "w.safetensors")


def test_export_refuses_metadata_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\{'step': 3\}"):
        export_shards(model_shards(make_model()), tmp_path / "w.safetensors", {"step": 3})  # type: ignore[dict-item]  # what is tested


def test_load_weights_takes_a_checkpoint_directory(tmp_path: Path) -> None:
    model = make_model()
    path = write(tmp_path / "step-1", shards=model_shards(model), header={})

    assert_same(load_weights(path), model)


def test_load_weights_takes_a_mapping() -> None:
    model = make_model()

    assert_same(load_weights(model.state_dict()), model)


def test_load_weights_refuses_a_mapping_of_something_else() -> None:
    with pytest.raises(CheckpointError, match="'state_dict' is a dict"):
        load_weights({"state_dict": {}})  # type: ignore[dict-item]  # what is tested


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "pytorch_model.bin", "last.ckpt"])
def test_load_weights_says_how_to_convert_a_pickle(tmp_path: Path, name: str) -> None:
    torch.save(make_model().state_dict(), tmp_path / name)

    with pytest.raises(CheckpointError) as raised:
        load_weights(tmp_path / name)

    assert "pickle" in str(raised.value)
    assert "weights_only=True" in str(raised.value)
    assert f"{Path(name).stem}.safetensors" in str(raised.value)


def test_load_weights_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights at .*w\.safetensors"):
        load_weights(tmp_path / "w.safetensors")


def test_load_weights_names_a_truncated_file(tmp_path: Path) -> None:
    exported = export_shards(model_shards(make_model()), tmp_path / "w.safetensors")
    exported.write_bytes(exported.read_bytes()[:-5])

    with pytest.raises(CheckpointError, match=r"w\.safetensors is no intact"):
        load_weights(exported)

"""Pieces written by any ranks come back bitwise, in any other division."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from torchweld.checkpoint import Checkpoint, encode, rank_name, write
from torchweld.interfaces import Shard

Save = Callable[..., list[Path]]

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.uint32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


def whole(name: str, tensor: Tensor) -> Shard:
    return Shard(name, tensor, tuple(tensor.shape), (0,) * tensor.ndim)


def rows(name: str, tensor: Tensor, world_size: int) -> list[list[Shard]]:
    """Divide as FSDP2 does: equal rows, the last ranks may have fewer or none."""
    size = -(-len(tensor) // world_size)
    parts = [tensor[rank * size : (rank + 1) * size] for rank in range(world_size)]
    return [
        [
            Shard(
                name, part, tuple(tensor.shape), (rank * size, 0) if len(part) else (len(tensor), 0)
            )
        ]
        for rank, part in enumerate(parts)
    ]


def ranges(name: str, tensor: Tensor, world_size: int) -> list[list[Shard]]:
    """Divide as ZeRO does: ranges of the flattened tensor, cut anywhere."""
    draw = random.Random(world_size)
    cuts = sorted(draw.randint(0, tensor.numel()) for _ in range(world_size - 1))
    bounds = [0, *cuts, tensor.numel()]
    flat = tensor.reshape(-1)
    return [
        [Shard(name, flat[low:high], tuple(tensor.shape), low)] for low, high in pairwise(bounds)
    ]


def random_boxes(draw: random.Random, shape: tuple[int, ...], count: int) -> list[list[slice]]:
    """Cut a tensor into boxes, at random places and along random dims."""
    boxes = [[slice(0, size) for size in shape]]
    for _ in range(count):
        box = draw.choice(boxes)
        dim = draw.randrange(len(shape))
        low, high = box[dim].start, box[dim].stop
        if high - low > 1:
            cut = draw.randint(low + 1, high - 1)
            boxes.append([*box[:dim], slice(cut, high), *box[dim + 1 :]])
            box[dim] = slice(low, cut)
    return boxes


def box_shards(name: str, tensor: Tensor, boxes: list[list[slice]]) -> list[Shard]:
    return [
        Shard(name, tensor[tuple(box)], tuple(tensor.shape), tuple(side.start for side in box))
        for box in boxes
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoint_returns_every_dtype_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 200, (3, 4)).to(dtype)
    odd = torch.ones(3, dtype=torch.uint8)

    path = write(
        tmp_path / "step-1", shards=[whole("model/w", tensor), whole("model/b", odd)], header={}
    )

    checkpoint = Checkpoint.open(path)
    assert checkpoint.info("model/w") == ((3, 4), dtype)
    assert checkpoint.tensor("model/w").tolist() == tensor.tolist()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (1, 1, 5), (2, 3, 4, 5)], ids=str)
def test_checkpoint_returns_every_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)

    path = write(tmp_path / "step-1", shards=[whole("model/w", tensor)], header={})

    assert torch.equal(Checkpoint.open(path).tensor("model/w"), tensor)


def test_checkpoint_takes_a_view_a_transpose_and_a_parameter(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    given = {"v": base[1:, ::2], "t": base.t(), "c": base.to(torch.complex64).conj()}
    parameter = torch.nn.Parameter(base)

    path = write(
        tmp_path / "step-1",
        shards=[*(whole(name, value) for name, value in given.items()), whole("p", parameter)],
        header={},
    )

    checkpoint = Checkpoint.open(path)
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in given.items())
    assert torch.equal(checkpoint.tensor("p"), base)


@pytest.mark.parametrize("divide", [rows, ranges], ids=["rows", "ranges"])
@pytest.mark.parametrize("writers", [1, 2, 3, 7])
def test_pieces_of_several_ranks_make_the_tensor(
    tmp_path: Path, save: Save, divide: Callable[..., list[list[Shard]]], writers: int
) -> None:
    tensor = torch.randn(5, 7)

    path, *_ = save(tmp_path / "step-1", divide("model/w", tensor, writers))

    assert torch.equal(Checkpoint.open(path).tensor("model/w"), tensor)


@pytest.mark.parametrize("seed", range(30))
def test_boxes_and_ranges_turn_into_each_other(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 4)))
    tensor = torch.randn(shape)
    written = draw.choice(
        [
            box_shards("w", tensor, random_boxes(draw, shape, 6)),
            [shard for shards in ranges("w", tensor, 4) for shard in shards],
        ]
    )
    checkpoint = Checkpoint.open(write(tmp_path / "step-1", shards=written, header={}))

    for shard in [
        *box_shards("w", tensor, random_boxes(draw, shape, 6)),
        *(shard for shards in ranges("w", tensor, 3) for shard in shards),
    ]:
        local = torch.full_like(shard.local, float("nan"))
        checkpoint.fill("w", local, shard.start)
        assert torch.equal(local, shard.local)


def test_boxes_and_ranges_of_one_tensor_may_be_mixed(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    shards = [
        Shard("w", tensor[:2, :3], (4, 6), (0, 0)),
        Shard("w", tensor[:2, 3:], (4, 6), (0, 3)),
        Shard("w", tensor[2:].reshape(-1), (4, 6), 12),
    ]

    checkpoint = Checkpoint.open(write(tmp_path / "step-1", shards=shards, header={}))

    assert torch.equal(checkpoint.tensor("w"), tensor)


def test_fill_keeps_the_strides_of_its_target(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 4)
    path = write(tmp_path / "step-1", shards=[whole("w", tensor)], header={})
    local = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)

    Checkpoint.open(path).fill("w", local, (0, 0, 0, 0))

    assert torch.equal(local, tensor)
    assert local.is_contiguous(memory_format=torch.channels_last)


def test_fill_takes_a_range_with_strides(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    path = write(tmp_path / "step-1", shards=[whole("w", tensor)], header={})
    local = torch.zeros(6, 2)[::2].t()

    Checkpoint.open(path).fill("w", local, 4)

    assert torch.equal(local.reshape(-1), tensor.view(-1)[4:10])


def test_fill_writes_into_a_parameter(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    path = write(tmp_path / "step-1", shards=[whole("w", tensor)], header={})
    parameter = torch.nn.Parameter(torch.zeros(3, 4))

    Checkpoint.open(path).fill("w", parameter, (0, 0))

    assert torch.equal(parameter.data, tensor)


def test_live_tensors_may_change_after_the_save(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    path = write(tmp_path / "step-1", shards=[whole("w", tensor)], header={})

    tensor.zero_()

    assert torch.equal(Checkpoint.open(path).tensor("w"), torch.ones(3))


def test_safetensors_itself_reads_the_file_of_a_rank(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.ones(1, dtype=torch.bool), "c": torch.tensor(2)}

    path = write(
        tmp_path / "step-1",
        shards=[whole(name, value) for name, value in tensors.items()],
        header={},
    )

    loaded = load_file(path / "00000.safetensors")
    assert all(torch.equal(loaded[name], value.reshape(-1)) for name, value in tensors.items())


def test_every_rank_keeps_its_own_tensors_and_state(tmp_path: Path, save: Save) -> None:
    path, *_ = save(
        tmp_path / "step-1",
        [[], []],
        tensors=[{rank_name(rank, "rng/torch"): torch.tensor(rank)} for rank in range(2)],
        state=[{"python": [rank]} for rank in range(2)],
    )

    checkpoint = Checkpoint.open(path)
    assert checkpoint.rank_tensors(1) == {"rng/torch": torch.tensor(1)}
    assert checkpoint.rank_state(1) == {"python": [1]}
    assert checkpoint.rank_state(2) is None


def test_component_state_comes_back_from_the_header(tmp_path: Path) -> None:
    state = {"slow": {"w": torch.randn(2)}, "seen": {1: (2, 3)}}
    encoded, tensors = encode(state, "component/lookahead")

    path = write(
        tmp_path / "step-1",
        shards=[],
        tensors=tensors,
        header={"components": {"lookahead": encoded}},
    )

    checkpoint = Checkpoint.open(path)
    found = checkpoint.decode(checkpoint.header["components"]["lookahead"])
    assert torch.equal(found["slow"]["w"], state["slow"]["w"])  # type: ignore[index]  # a mapping
    assert found["seen"] == {1: (2, 3)}


def test_manifest_holds_progress_and_header(tmp_path: Path) -> None:
    header = {"step": 90, "epoch": 2, "samples": 5760, "hparams": {"note": "é"}}

    checkpoint = Checkpoint.open(write(tmp_path / "step-90", shards=[], header=header))

    assert checkpoint.header == header
    assert [checkpoint.manifest[key] for key in ("step", "epoch", "samples")] == [90, 2, 5760]
    assert checkpoint.manifest["world_size"] == 1

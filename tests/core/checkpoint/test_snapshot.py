"""A snapshot is written later, as it was, and no rank spoils what another completes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.checkpoint.conftest import SharedTexts
from torchweld.checkpoint import Checkpoint, Draft, alone, find_damage, snapshot
from torchweld.checkpoint.collect import collect_entries
from torchweld.errors import CheckpointError
from torchweld.interfaces import Shard


def whole(name: str, tensor: Tensor) -> Shard:
    return Shard(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def live(path: Path, shards: list[Shard]) -> Draft:
    """What ``snapshot`` makes, without the copy."""
    draft = Draft(path, 0, 1, {}, None)
    draft.take_in(alone, lambda: collect_entries(shards, {}))
    return draft


def copied(path: Path, shards: list[Shard]) -> Draft:
    return snapshot(path, shards=shards, header={})


@pytest.mark.parametrize(("take", "expected"), [(copied, 1.0), (live, 0.0)])
def test_a_snapshot_holds_what_was_there_and_live_memory_does_not(
    take: Callable[..., Draft], expected: float, tmp_path: Path
) -> None:
    weight = torch.ones(3, 4)
    draft = take(tmp_path / "step-1", [whole("model/w", weight)])
    weight.zero_()

    path = draft.finish(alone)

    assert torch.equal(Checkpoint.open(path).tensor("model/w"), torch.full((3, 4), expected))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(6.0).expand(4, 6),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.tensor(3),
        torch.empty(0, 5),
        torch.randn(8).to(torch.float8_e4m3fn),
        torch.nn.Parameter(torch.randn(4)),
    ],
    ids=["transposed", "expanded", "conjugate", "scalar", "empty", "float8", "parameter"],
)
def test_a_snapshot_of_any_tensor_comes_back_equal(tensor: Tensor, tmp_path: Path) -> None:
    path = copied(tmp_path / "step-1", [whole("w", tensor)]).finish(alone)

    found = Checkpoint.open(path).tensor("w")
    assert found.dtype == tensor.dtype
    assert torch.equal(found.to(torch.complex64), tensor.detach().to(torch.complex64))


@pytest.mark.gpu
def test_a_snapshot_of_cuda_memory_holds_what_was_there(tmp_path: Path) -> None:
    weight = torch.ones(50_000_000, device="cuda")
    draft = copied(tmp_path / "step-1", [whole("w", weight)])
    weight.zero_()

    assert all(entry.tensor.is_pinned() for entry in draft.entries)
    assert Checkpoint.open(draft.finish(alone)).tensor("w").min() == 1.0


def test_header_state_and_further_tensors_may_change_afterwards(tmp_path: Path) -> None:
    header, state, extra = {"hparams": {"lr": [1]}}, {"calls": [1]}, torch.ones(2)
    draft = snapshot(
        tmp_path / "step-1", shards=[], tensors={"rank/00000/x": extra}, header=header, state=state
    )
    header["hparams"]["lr"].append(2)
    state["calls"].append(2)
    extra.zero_()

    checkpoint = Checkpoint.open(draft.finish(alone))

    assert checkpoint.header["hparams"] == {"lr": [1]}
    assert checkpoint.rank_state(0) == {"calls": [1]}
    assert checkpoint.tensor("rank/00000/x").tolist() == [1.0, 1.0]


def test_what_cannot_be_saved_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="plain dense tensor"):
        copied(tmp_path / "step-1", [whole("w", torch.zeros(3).to_sparse())])

    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_stops_after_it_has_written_leaves_its_files_to_rank_0(tmp_path: Path) -> None:
    path, shared = tmp_path / "step-1", SharedTexts(2)

    def draft(rank: int) -> Draft:
        shard = Shard("w", torch.ones(2), (4,), (2 * rank,))
        return snapshot(
            path, rank=rank, world_size=2, exchange=shared.of(rank), shards=[shard], header={}
        )

    def told(label: str, text: str) -> list[str]:
        texts = shared.of(1)(label, text)
        if label.endswith("written"):
            raise KeyboardInterrupt
        return texts

    def waiting(label: str, text: str) -> list[str]:
        if label.endswith("complete"):
            return [text, text]
        texts = shared.of(0)(label, text)
        assert stopping.exception(10) is not None
        return texts

    def one(rank: int, exchange: Any) -> Callable[[], Path]:
        return lambda: draft(rank).finish(exchange)

    with ThreadPoolExecutor(2) as pool:
        stopping = pool.submit(one(1, told))
        completing = pool.submit(one(0, waiting))

        assert completing.result(10) == path
    assert find_damage(path) == []

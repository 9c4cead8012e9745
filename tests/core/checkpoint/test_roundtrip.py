"""Pieces written by one or several ranks come back bitwise, in any other division."""

from __future__ import annotations

from pathlib import Path

import torch

from torchweld.checkpoint import Checkpoint, write
from torchweld.interfaces import Shard


def test_checkpoint_returns_a_whole_tensor_bitwise(tmp_path: Path) -> None:
    weight = torch.randn(4, 5)

    path = write(tmp_path / "step-1", shards=[Shard("model/w", weight, (4, 5), (0, 0))], header={})

    assert torch.equal(Checkpoint.open(path).tensor("model/w"), weight)

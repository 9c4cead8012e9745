"""Checkpoints that are written beside the training of a sharded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.saving_beside import collectives_of_a_save, differences
from torchweld.testing import run_ranks


@pytest.mark.parametrize("strategy", ["fsdp", "fairscale_sdp"])
def test_a_checkpoint_written_beside_the_training_is_the_snapshot(
    strategy: str, tmp_path: Path
) -> None:
    for found in run_ranks(differences, 2, str(tmp_path), strategy, {}, timeout_seconds=180):
        assert found == []


def test_saving_beside_leaves_the_process_group_to_the_training(tmp_path: Path) -> None:
    for counts in run_ranks(collectives_of_a_save, 2, str(tmp_path), "fsdp", timeout_seconds=180):
        assert counts == (0, 0, 1)

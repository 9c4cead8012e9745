"""Where an interrupted epoch goes on when batch size, processes or windows are other ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchweld.errors import CheckpointError


@dataclass(frozen=True)
class Reading:
    """How a run reads its data.

    Attributes:
        batch_size: samples a process and batch, None when unknown.
        world_size: number of processes.
        accumulate: batches in a window.
        has_length: False where nobody knows how many batches an epoch has; windows then run on
            over the ends of epochs.
    """

    batch_size: int | None
    world_size: int
    accumulate: int
    has_length: bool = True


def batch_here(data: Mapping[str, Any], now: Reading) -> int:
    """Return the batch at which a run that reads like ``now`` goes on in the epoch.

    Args:
        data: the header's ``data``: ``batch``, ``batch_size`` and ``world_size`` of the run that
            was saved.
        now: of the run that resumes.

    Raises:
        CheckpointError: no batch of it begins where the other run stopped.
    """
    size, world = now.batch_size, now.world_size
    before = (data["batch_size"], data["world_size"])
    batch, rest = int(data["batch"]), 0
    if batch and before != (size, world):
        if size is None or data["batch_size"] is None:
            raise CheckpointError(
                f"the checkpoint is in the middle of an epoch read by {data['world_size']} "
                f"processes, and this run has {world}: resume on {data['world_size']}, or from the "
                "end of an epoch"
            )
        batch, rest = divmod(batch * before[0] * before[1], size * world)
    if rest or (now.has_length and batch % now.accumulate):
        raise CheckpointError(
            f"the checkpoint is in the middle of an epoch, after {data['batch']} batches of "
            f"{before[0]} on each of {before[1]} processes, which is no multiple of this run's "
            f"window ({now.accumulate} x {size} on {world}): resume with a batch size, number of "
            "processes and accumulate_grad_batches that divide it, or from the end of an epoch"
        )
    return batch

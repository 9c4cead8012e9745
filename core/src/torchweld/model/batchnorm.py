"""BatchNorm over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from torchweld.errors import RunError

if TYPE_CHECKING:
    from torchweld.interfaces import Env


def check_can_synchronise(env: Env) -> None:
    """Refuse SyncBatchNorm where its first training forward would fail.

    Raises:
        RunError: several processes without CUDA.
    """
    if env.world_size > 1 and env.device.type != "cuda":
        raise RunError(
            f"sync_batchnorm=True was asked for, and this run is on {env.device.type!r}: torch's "
            "SyncBatchNorm works on GPUs only; leave it out (each process normalises with its own "
            "batch), or choose GroupNorm"
        )


def synchronised(model: nn.Module, env: Env) -> nn.Module:
    """Return ``model`` with SyncBatchNorm for BatchNorm, over the same parameters and buffers.

    In one process there is nothing to synchronise, and the model is returned as it is.
    """
    if env.world_size == 1:
        return model
    converted: nn.Module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, env.group)
    return converted

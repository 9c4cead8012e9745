"""Clipping of gradients of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def clip_parts(
    parts: Sequence[Tensor],
    limit: float,
    group: dist.ProcessGroup | None,
    device: torch.device,
    *,
    whole: Sequence[Tensor] = (),
) -> Tensor:
    """Scale gradients to a norm over all ranks of at most ``limit``; returns that norm.

    Collective, one ``all_reduce``. Few Python calls, however many gradients: the functions of
    ``nn.utils`` make two for each.

    Args:
        parts: gradients, or parts of them, that are on this rank and on no other.
        limit: largest norm, > 0.
        group: the ranks that hold the other parts; None for one process without a group.
        device: of the norm, where this rank has no gradient.
        whole: gradients that every rank of ``group`` holds alike.
    """
    gradients = [*parts, *whole]
    if group is None or group.size() == 1:
        norm = _norm(gradients, device)
    else:
        square = _norm(parts, device).float().square()
        dist.all_reduce(square, group=group)
        if whole:  # every rank has them, so they are counted once, after the sum
            square += _norm(whole, device).float().square()
        norm = square.sqrt()
    if gradients:
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm


def _norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([*gradients])))
    return norm

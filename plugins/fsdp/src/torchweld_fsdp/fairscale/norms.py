"""The norm of gradients of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchweld.interfaces import Env


def clip_parts(parameters: Sequence[nn.Parameter], limit: float, env: Env) -> Tensor:
    """Scale gradients to a norm over all ranks of at most ``limit``; returns that norm.

    Collective, one reduce. Few Python calls, however many parameters: the functions of
    ``nn.utils`` make two for each.

    Args:
        parameters: those whose gradient, or part of it, is on this rank and on no other.
        limit: largest norm, > 0.
        env: this rank among those that hold the other parts.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _norm(gradients, env.device)
    if env.world_size > 1:
        square = norm.square()
        dist.all_reduce(square, group=env.group)
        norm = square.sqrt()
    if gradients:
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch.stack(torch._foreach_norm(gradients))
    norm: Tensor = torch.linalg.vector_norm(norms).float()
    return norm

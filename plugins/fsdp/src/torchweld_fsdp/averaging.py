"""Do the collectives of this process group average? Tried out, and repaired where they sum.

FSDP2 asks reduce-scatter for an average; gloo of some torch versions sums instead, so gradients
are as many times too large as there are ranks, and clipping or Adam hide it
(https://github.com/pytorch/pytorch/issues/162338). No version is asked: a repaired back end with
the remedy on would divide twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from torchweld.errors import RunError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def average_of_ones(group: dist.ProcessGroup, device: torch.device) -> float:
    """Return what ``reduce_scatter`` makes of the average of ones; every rank must call it.

    Returns:
        1.0 where it averages, the number of ranks where it sums.
    """
    average = torch.empty(1, device=device)
    ones = torch.ones(group.size(), device=device)
    # The older name, the only one up to torch 2.12, warns on 2.13.
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    reduce_scatter(average, ones, op=dist.ReduceOp.AVG, group=group)
    return float(average)


def check_replicas_average(group: dist.ProcessGroup, device: torch.device) -> None:
    """Refuse a group whose ``all_reduce`` cannot average, as the replicas of HSDP need.

    Raises:
        RunError: with the reason of the back end.
    """
    one = torch.ones(1, device=device)
    try:
        dist.all_reduce(one, op=dist.ReduceOp.AVG, group=group)
        problem = "" if float(one) == 1.0 else f"the average of ones is {float(one):g}"
    except (RuntimeError, ValueError) as error:
        problem = str(error).partition("\n")[0]
    if problem:
        raise RunError(
            f"fsdp: replicate={group.size()} averages gradients over the replicas, which "
            f"{dist.get_backend(group)} of torch {torch.__version__} cannot do ({problem}): leave "
            "replicate at 1, or take a newer torch"
        )


def repair_averages(
    modules: Iterable[FSDPModule],
    group: dist.ProcessGroup,
    device: torch.device,
    reduce_dtype: torch.dtype,
) -> list[str]:
    """Divide gradients where the back end sums them; returns what was found, for the run report.

    Args:
        modules: every sharded module.
        group: over which gradients are reduce-scattered.
        device: of the gradients.
        reduce_dtype: in which they are; FSDP2 divides those of fp16 itself and asks for sums.

    Raises:
        RunError: the average of ones is neither one nor the number of ranks.
    """
    size = group.size()
    if size == 1 or reduce_dtype == torch.float16:
        return []
    found = average_of_ones(group, device)
    if found == 1.0:
        return []
    if found != size:
        raise RunError(
            f"fsdp: the average of {size} ones over {dist.get_backend(group)} is {found:g}, so no "
            "gradient of this run could be trusted: take another back end or torch"
        )

    def divide(gradient: Tensor) -> None:
        gradient.div_(size)

    for module in modules:
        module.set_all_reduce_hook(divide)
    back_end = f"{dist.get_backend(group)} of torch {torch.__version__}"
    return [f"{back_end} sums where an average is asked for: gradients are divided by {size}"]

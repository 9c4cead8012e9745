"""Values of all processes, side by side."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch

from torchweld.errors import RanksDisagree

if TYPE_CHECKING:
    from torchweld.processes.ranks import Ranks


def gather(ranks: Ranks, value: Any) -> torch.Tensor:
    """Return the values of all ranks, of shape ``(world_size, *shape)``, without gradients.

    Raises:
        RanksDisagree: shapes or dtypes are not the same; on all ranks.
    """
    mine = torch.as_tensor(value, device=ranks.env.device).detach()
    _check_alike(ranks, mine)
    table = mine.new_zeros((ranks.world_size, *mine.shape))
    table[ranks.rank] = mine
    # In bytes, since back ends cannot add every dtype; all but one rank's are zero, so that each
    # value comes back bit for bit.
    ranks.sum(table.view(-1).view(torch.uint8))
    return table


def _check_alike(ranks: Ranks, mine: torch.Tensor) -> None:
    """Compare before the collective, where other sizes would be waited for or mixed up.

    Sum and sum of squares are right together only if all are alike; the store, which keeps what
    it is told, is asked only where they are not.
    """
    form = f"{tuple(mine.shape)} {mine.dtype}"
    mark = zlib.crc32(form.encode()) >> 8  # whose squares are exact
    marks = torch.tensor([mark, mark**2], device=ranks.env.device)
    total, squares = ranks.sum(marks).tolist()
    if total**2 == ranks.world_size * squares:
        return
    forms = ranks.exchange("run.gather", form)
    listed = ", ".join(f"{each} (rank {rank})" for rank, each in enumerate(forms))
    raise RanksDisagree(
        f"run.gather was given values of other shapes or dtypes: {listed}; gather values that are "
        "alike, padded to one shape, or what they add up to, as metrics= does"
    )

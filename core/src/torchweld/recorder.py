"""Losses and other scalars of a run: kept on the device, read once a border."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchweld.errors import LoopError

if TYPE_CHECKING:
    from torchweld.ranks import Ranks


class Totals(NamedTuple):
    """What all ranks together did since the last agreed border."""

    metrics: dict[str, float]
    samples: int
    stop: bool


class Recorder:
    """Collects per micro-batch on the device and reduces once a border.

    Attributes:
        losses: detached losses of the running segment; the inner loops append.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.losses: list[Tensor] = []
        self._ranks = ranks
        self._loss_sum: Tensor | float = 0.0
        self._samples = 0
        self._named: dict[str, list[Any]] = {}

    def note(self, scalars: Mapping[str, Any]) -> None:
        """Keep scalars by name; tensors stay on the device."""
        for name, value in scalars.items():
            kept = value.detach() if isinstance(value, Tensor) else float(value)
            self._named.setdefault(name, []).append(kept)

    def close_segment(self, samples: int, weights: list[int] | None = None) -> None:
        """Fold the losses of a segment into one sum over its samples; does not wait.

        Args:
            samples: real samples of the segment on this rank.
            weights: samples of each batch where they are not all equal.
        """
        if not self.losses:
            return
        losses = torch.stack(self.losses).double()
        if weights is not None:
            total = (
                losses * torch.tensor(weights, dtype=torch.float64, device=losses.device)
            ).sum()
        else:
            total = losses.mean() * samples
        self._loss_sum = self._loss_sum + total
        self._samples += samples
        self.losses.clear()

    def reduce(self, *, stop: bool, grad_norm: Tensor | None = None) -> Totals:
        """Add up over all ranks: one reduction, one read. Every rank must call it.

        Args:
            stop: this rank asks for the end of the run.
            grad_norm: of the last step, equal on all ranks.

        Raises:
            LoopError: ranks logged different names.
            RunError: the loss is not finite.
        """
        names = sorted(self._named)
        signature = float(zlib.crc32("\n".join(names).encode()))
        head = [self._loss_sum, float(self._samples), float(stop), signature, signature**2]
        head += [grad_norm] if grad_norm is not None else []
        table = self._ranks.sum(self._table(head)).tolist()
        self._check_names(signature, table[3], table[4], names)
        samples = round(table[1])
        metrics = {"train_loss": table[0] / samples} if samples else {}
        if grad_norm is not None:
            metrics["grad_norm"] = table[5] / self._ranks.world_size
        metrics |= self._reduce_named(names)
        self._loss_sum, self._samples = 0.0, 0
        return Totals(metrics, samples, table[2] > 0)

    def _table(self, values: list[Any]) -> Tensor:
        device = self._ranks.env.device
        return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])

    def _check_names(self, mine: float, total: float, squares: float, names: list[str]) -> None:
        world = self._ranks.world_size
        if total != world * mine or not math.isclose(squares, world * mine**2, rel_tol=1e-12):
            raise LoopError(
                f"the processes logged different names at one border; rank {self._ranks.rank} "
                f"logged {names}: call run.log with the same names on every process"
            )

    def _reduce_named(self, names: list[str]) -> dict[str, float]:
        if not names:
            return {}
        means = [self._table(self._named[name]).mean() for name in names]
        table = self._ranks.sum(torch.stack(means)) / self._ranks.world_size
        self._named.clear()
        return dict(zip(names, table.tolist(), strict=True))

"""Losses and other scalars of a run: kept on the device, read once a border."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchweld.checkpoint import of_epoch
from torchweld.errors import LoopError

if TYPE_CHECKING:
    from torchweld.processes.ranks import Ranks


class Totals(NamedTuple):
    """What all ranks together did since the last agreed border."""

    metrics: dict[str, float]
    samples: int
    stop: bool
    end: bool
    seconds: float


class Recorder:
    """Collects per micro-batch on the device and reduces once a border.

    Attributes:
        losses: detached losses of the running segment; the inner loops append.
        epoch_sums: of the running epoch up to the last border, over all ranks: the sum and the
            count behind the mean of each name.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.losses: list[Tensor] = []
        self._ranks = ranks
        self._loss_sum: Tensor | None = None
        self._samples = 0
        self._named: dict[str, list[tuple[Any, list[float]]]] = {}
        # How many samples a noted value stands for. Of a whole segment that is known at its end:
        # a list of one number, which is written to there.
        self._segment_weight = self._weight = [1.0]
        self.epoch_sums: dict[str, tuple[float, float]] = {}

    def note(self, scalars: Mapping[str, Any]) -> None:
        """Keep scalars by name; tensors stay on the device."""
        for name, value in scalars.items():
            kept = value.detach() if isinstance(value, Tensor) else float(value)
            self._named.setdefault(name, []).append((kept, self._weight))

    def weigh(self, samples: int) -> None:
        """Let what is noted from now on, until the segment is closed, stand for these samples."""
        self._weight = [float(samples)]

    def close_segment(self, samples: int, weights: list[int] | None = None) -> None:
        """Fold the losses of a segment into one sum over its samples; does not wait.

        Args:
            samples: real samples of the segment on this rank.
            weights: samples of each batch where they are not all equal.
        """
        self._weight = self._segment_weight
        if not self.losses:
            return
        self._weight[0] = samples / len(self.losses)
        self._segment_weight = self._weight = [1.0]
        losses = torch.stack(self.losses)
        if weights is None:
            total = losses.mean(dtype=torch.float64) * samples
        else:
            total = (losses * losses.new_tensor(weights, dtype=torch.float64)).sum()
        self._loss_sum = total if self._loss_sum is None else self._loss_sum + total
        self._samples += samples
        self.losses.clear()

    def reduce(
        self,
        *,
        stop: bool,
        end: bool = False,
        grad_norm: Tensor | None = None,
        seconds: float = 0.0,
    ) -> Totals:
        """Add up over all ranks. Every rank must call it.

        It is one reduction and one read, and where scalars were noted by name a second of each:
        how many there are has to be known to be equal before they are added up.

        Args:
            stop: this rank asks for the end of the run.
            end: this rank was asked by a signal to end.
            grad_norm: of the last step, equal on all ranks.
            seconds: used so far here; the result has their mean.

        Raises:
            LoopError: ranks logged different names.
        """
        names = sorted(self._named)
        signature = float(zlib.crc32("\n".join(names).encode()))
        numbers = [0.0, 0.0, self._samples, stop, end, seconds, signature, signature**2]
        table = torch.tensor(numbers, dtype=torch.float64, device=self._ranks.env.device)
        for place, measured in enumerate((self._loss_sum, grad_norm)):
            if measured is not None:
                table[place] = measured
        loss, norm, samples, stops, ends, seconds, *signatures = self._ranks.sum(table).tolist()
        self._check_names(signature, signatures, names)
        metrics, sums = {}, self.epoch_sums
        if samples:
            metrics["train_loss"] = loss / samples
            before, counted = sums.get("train_loss", (0.0, 0.0))
            sums["train_loss"] = before + loss, counted + samples
        if grad_norm is not None:
            metrics["grad_norm"] = norm / self._ranks.world_size
        metrics |= self._reduce_named(names)
        self._loss_sum, self._samples = None, 0
        mean_seconds = seconds / self._ranks.world_size
        return Totals(metrics, round(samples), stops > 0, ends > 0, mean_seconds)

    def _check_names(self, mine: float, sums: list[float], names: list[str]) -> None:
        """Compare by sum and sum of squares: together they are right only if all are alike."""
        world, (total, squares) = self._ranks.world_size, sums
        if total != world * mine or not math.isclose(squares, world * mine**2, rel_tol=1e-12):
            raise LoopError(
                f"the processes logged different names at one border; rank {self._ranks.rank} "
                f"logged {names}: call run.log with the same names on every process"
            )

    def _reduce_named(self, names: list[str]) -> dict[str, float]:
        if not names:
            return {}
        table = self._ranks.sum(torch.stack([self._sums(self._named[name]) for name in names]))
        self._named.clear()
        found = {}
        for name, (total, weight) in zip(names, table.tolist(), strict=True):
            if weight:
                found[name] = total / weight
            before, counted = self.epoch_sums.get(name, (0.0, 0.0))
            self.epoch_sums[name] = before + total, counted + weight
        return found

    def end_epoch(self) -> dict[str, float]:
        """Return the means over the epoch that has ended, as ``<name>/epoch``, and begin anew."""
        sums, self.epoch_sums = self.epoch_sums, {}
        return {of_epoch(name): total / count for name, (total, count) in sums.items() if count}

    def _sums(self, notes: list[tuple[Any, list[float]]]) -> Tensor:
        """The sum of the values, each times its samples, and the sum of these."""
        device = self._ranks.env.device
        tensors = [torch.as_tensor(v, dtype=torch.float64, device=device) for v, _ in notes]
        weights = tensors[0].new_tensor([samples for _, (samples,) in notes])
        return torch.stack([(torch.stack(tensors) * weights).sum(), weights.sum()])

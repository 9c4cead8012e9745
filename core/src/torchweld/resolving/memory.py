"""What a plan would hold on each rank, as a record and as text; made elsewhere, with torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HOW_TO_ASK = "give --model pkg:make --optimizer adamw"
"""Shown where no estimate was asked for."""

_LABELS = {"optimizer": "optimizer state"}


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank, before anything is built; activations are not among them.

    Attributes:
        model: what was asked for, e.g. ``"pkg:make"``.
        num_parameters: numbers in all parameters, tied ones once.
        optimizer: what was asked for, e.g. ``"adamw"``.
        optimizer_slots: tensors that it keeps for each trained parameter.
        world_size: number of processes.
        num_bytes: ``parameters``, ``gradients``, ``optimizer``, and what the strategy adds.
        note: how the model was built, where that is not on the meta device.
        units: which modules the strategy handles one by one; "" where that is the whole model.
    """

    model: str
    num_parameters: int
    optimizer: str
    optimizer_slots: int
    world_size: int
    num_bytes: Mapping[str, int]
    note: str = ""
    units: str = ""

    @property
    def sum_bytes(self) -> int:
        """All of it."""
        return sum(self.num_bytes.values())

    def as_data(self) -> dict[str, Any]:
        """The same for JSON, with the sum."""
        return {**asdict(self), "num_bytes": dict(self.num_bytes), "sum_bytes": self.sum_bytes}

    def lines(self) -> list[str]:
        """A heading, a line for each kind, and the sum."""
        several = self.world_size > 1
        where = f"each of {self.world_size} processes" if several else "1 process"
        slots = f"{self.optimizer_slots} tensor{'' if self.optimizer_slots == 1 else 's'}"
        count = f"{count_text(self.num_parameters)} parameters"
        rows = [(_LABELS.get(kind, kind), size) for kind, size in self.num_bytes.items()]
        rows.append(("sum", self.sum_bytes))
        width = max(len(label) for label, _ in rows) + 2
        return [
            f"{where}: {self.model} ({count}), {self.optimizer} ({slots} each)",
            *([self.note] if self.note else []),
            *([f"units: {self.units}"] if self.units else []),
            *(f"{label:{width}}{size_text(size):>9}" for label, size in rows),
            "activations and buffers come on top",
        ]


def size_text(num_bytes: float) -> str:
    """Bytes as people read them.

    >>> [size_text(n) for n in (0, 999, 1_070_000, 2.5e9)]
    ['0 B', '999 B', '1.1 MB', '2.5 GB']
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def count_text(count: int) -> str:
    """A number of parameters as people read it.

    >>> [count_text(n) for n in (7, 2_672, 270_346, 1_300_000_000)]
    ['7', '2 672', '0.27 M', '1300.00 M']
    """
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}".replace(",", " ")

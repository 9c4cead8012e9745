"""What a batch holds, said before the first one comes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FieldContract:
    """One field of a batch.

    Attributes:
        name: of the field.
        shape: without the batch dimension; None: a list with one item a sample.
        dtype: torch's name, "float32"; "object" for a list of Python objects.
        layout: ``contiguous`` or ``channels_last``.
        low: smallest value that can come, None where that is not known.
        high: largest value that can come, None where that is not known.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    layout: str = "contiguous"
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name} list of {self.dtype}"
        sizes = ", ".join(["batch", *map(str, self.shape)])
        text = f"{self.name} ({sizes}{'' if self.shape else ','}) {self.dtype}"
        if self.layout != "contiguous":
            text += f" {self.layout}"
        if self.low is not None and self.high is not None:
            text += f" in [{self.low:.4g}, {self.high:.4g}]"
        return text


@dataclass(frozen=True)
class BatchContract:
    """The fields of a batch, in its order.

    Attributes:
        fields: one each.
        form: a batch is a ``tuple``, a ``dict`` with the fields' names, or the only ``field``.
    """

    fields: tuple[FieldContract, ...]
    form: str

    def __str__(self) -> str:
        return f"{self.form} of " + ", ".join(map(str, self.fields))

"""Options of the data source ``ffcv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from torchweld_ffcv.spec import AsStored, ImageSpec, NumberSpec, Skip


@dataclass(frozen=True)
class FfcvOptions:
    """How a ``.beton`` file, or a Dataset that becomes one, is read."""

    batch_size: int | None = None  # samples a process and step, > 0; a DataLoader brings its own
    num_workers: int | None = None  # threads that read; None: this process's share of the cores
    shuffle: bool | None = None  # None: training is shuffled, the other splits are not
    order: Literal["random", "quasi_random"] = "random"  # of shuffling; quasi: page by page
    drop_last: bool = False  # leave out an incomplete last batch of training
    spec: Mapping[str, Any] | None = None  # field to image(…), int64(), float32(), skip()
    pipelines: Mapping[str, Sequence[Any] | None] | None = None  # FFCV's own, instead of spec
    fields: Mapping[str, Any] | None = None  # how a Dataset is stored; None: found out
    batches_ahead: int = 2  # batches read while one is in use, >= 1
    on_unsupported: Literal["error", "dataloader"] = "error"  # what cannot be compiled or converted
    skip_bad: bool = False  # leave out samples that cannot be converted, and say how many
    cache_dir: str | None = None  # where converted Datasets are kept; None: the user's cache

    def __post_init__(self) -> None:
        _require_positive("batch_size", self.batch_size)
        _require_positive("num_workers", self.num_workers)
        if self.batches_ahead < 1:
            raise ValueError(
                f"batches_ahead={self.batches_ahead!r} would write the next batch over the one in "
                "use: read at least 1 ahead"
            )
        if self.spec is not None and self.pipelines is not None:
            raise ValueError("spec= and pipelines= both say how fields are read; keep one")
        for name, chosen in (self.spec or {}).items():
            if not isinstance(chosen, (ImageSpec, NumberSpec, AsStored, Skip)):
                raise TypeError(
                    f"spec[{name!r}]={chosen!r} is none of image(…), int64(), float32(), "
                    "float64() and skip() of torchweld_ffcv"
                )


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, numpy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _require_positive(name: str, value: int | None) -> None:
    if value is not None and not (is_whole(value) and value >= 1):
        raise ValueError(f"{name}={value!r} is not an integer >= 1")

"""FFCV's data loading for torchweld.

Importing this module imports neither torch, numba nor ffcv; :mod:`torchweld_ffcv.install` is the
one place that imports ffcv, and only when a file is converted or a loader is built.
"""

from __future__ import annotations

from typing import Any

from torchweld import Component, hookimpl
from torchweld_ffcv.api import convert
from torchweld_ffcv.claims import ffcv_claims
from torchweld_ffcv.drop_in import Loader
from torchweld_ffcv.options import FfcvOptions
from torchweld_ffcv.spec import (
    IMAGENET,
    UNIT,
    ImageSpec,
    Normalize,
    float32,
    float64,
    image,
    int64,
    skip,
)

__all__ = [
    "FFCV",
    "IMAGENET",
    "UNIT",
    "FfcvOptions",
    "ImageSpec",
    "Loader",
    "Normalize",
    "convert",
    "float32",
    "float64",
    "image",
    "int64",
    "skip",
]

FFCV = Component(
    name="ffcv",
    summary="compiled loading from one .beton file",
    build="torchweld_ffcv.source:FfcvSource",
    options=FfcvOptions,
    claims=ffcv_claims,
    # No needs: where ffcv is missing the source says which system packages bring it, or reads with
    # a DataLoader (on_unsupported="dataloader"); an unmet need would stop the plan before that.
)


@hookimpl
def torchweld_data_sources() -> list[Component]:
    """``ffcv``."""
    return [FFCV]


@hookimpl
def torchweld_commands() -> list[Any]:
    """``torchweld ffcv convert`` and ``inspect``."""
    # Only the command line asks for them, and click takes 50 ms to import.
    from torchweld_ffcv.commands import convert_command, inspect_command

    return [convert_command, inspect_command]


@hookimpl
def torchweld_doctor() -> list[str]:
    """Where ffcv, or what it is compiled against, is missing."""
    from torchweld_ffcv.imports import doctor_lines

    return doctor_lines()

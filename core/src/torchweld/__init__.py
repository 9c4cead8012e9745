"""Training speed-ups as plugins, checked together, in a loop as fast as plain PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchweld.claims import Adapt, Claims, Rel
from torchweld.components import Component, Settings, Use, use
from torchweld.hookspecs import hookimpl
from torchweld.interfaces import Parts

if TYPE_CHECKING:
    from torchweld.callbacks import (
        EarlyStopping,
        LearningRateMonitor,
        ModelCheckpoint,
        ProfilerWindow,
        Unfreeze,
    )
    from torchweld.loop.loggers import CSVLogger, TensorBoardLogger
    from torchweld.loop.schedules import LRSchedule
    from torchweld.setup.applying import apply_surgery
    from torchweld.trainer import Trainer

__all__ = [
    "Adapt",
    "CSVLogger",
    "Claims",
    "Component",
    "EarlyStopping",
    "LRSchedule",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "Parts",
    "ProfilerWindow",
    "Rel",
    "Settings",
    "TensorBoardLogger",
    "Trainer",
    "Unfreeze",
    "Use",
    "apply_surgery",
    "hookimpl",
    "use",
]

# torch takes 2-3 s to import; `torchweld plugins` and every plugin's listing import this package.
_LAZY = {
    "CSVLogger": "torchweld.loop.loggers",
    "EarlyStopping": "torchweld.callbacks",
    "LRSchedule": "torchweld.loop.schedules",
    "LearningRateMonitor": "torchweld.callbacks",
    "ModelCheckpoint": "torchweld.callbacks",
    "ProfilerWindow": "torchweld.callbacks",
    "TensorBoardLogger": "torchweld.loop.loggers",
    "Trainer": "torchweld.trainer",
    "Unfreeze": "torchweld.callbacks",
    "apply_surgery": "torchweld.setup.applying",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'torchweld' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)

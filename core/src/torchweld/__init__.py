"""Training speed-ups as plugins, checked together, in a loop as fast as plain PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchweld.claims import Adapt, Claims, Rel
from torchweld.components import Component, Settings, Use, use
from torchweld.hookspecs import hookimpl
from torchweld.interfaces import Parts

if TYPE_CHECKING:
    from torchweld.callbacks import ModelCheckpoint
    from torchweld.trainer import Trainer, apply_surgery

__all__ = [
    "Adapt",
    "Claims",
    "Component",
    "ModelCheckpoint",
    "Parts",
    "Rel",
    "Settings",
    "Trainer",
    "Use",
    "apply_surgery",
    "hookimpl",
    "use",
]

# torch takes 2-3 s to import; `torchweld plugins` and every plugin's listing import this package.
_LAZY = {
    "ModelCheckpoint": "torchweld.callbacks",
    "Trainer": "torchweld.trainer",
    "apply_surgery": "torchweld.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'torchweld' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)

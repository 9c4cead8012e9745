"""Callbacks that core offers; anything with ``at(border, run)`` is one."""

from __future__ import annotations

from torchweld.callbacks.early_stopping import EarlyStopping
from torchweld.callbacks.learning_rate_monitor import LearningRateMonitor
from torchweld.callbacks.model_checkpoint import ModelCheckpoint
from torchweld.callbacks.profiler_window import ProfilerWindow
from torchweld.callbacks.timer import Timer
from torchweld.callbacks.unfreeze import Unfreeze

__all__ = [
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ProfilerWindow",
    "Timer",
    "Unfreeze",
]

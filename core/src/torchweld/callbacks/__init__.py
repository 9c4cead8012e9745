"""Callbacks that core offers; anything with ``at(border, run)`` is one."""

from __future__ import annotations

from torchweld.callbacks.model_checkpoint import ModelCheckpoint

__all__ = ["ModelCheckpoint"]

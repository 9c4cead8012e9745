"""Checkpoints: one format for every strategy, without pickle, written by core.

A strategy yields its pieces (``Prepared.shards``) and fills its own back from a ``ShardReader``;
nothing is gathered. ``format`` draws the directory, ``state`` says what a component may save.
"""

from __future__ import annotations

from torchweld.checkpoint.export import export_shards, export_weights, load_weights
from torchweld.checkpoint.find import (
    Skipped,
    best,
    checkpoints,
    complete,
    headers,
    last,
    of_epoch,
    prune,
    remove,
    value_here,
)
from torchweld.checkpoint.format import find_damage, is_checkpoint
from torchweld.checkpoint.reader import Checkpoint
from torchweld.checkpoint.report import describe, inspect
from torchweld.checkpoint.state import decode, encode
from torchweld.checkpoint.writer import Draft, Exchange, alone, rank_name, snapshot, write

__all__ = [
    "Checkpoint",
    "Draft",
    "Exchange",
    "Skipped",
    "alone",
    "best",
    "checkpoints",
    "complete",
    "decode",
    "describe",
    "encode",
    "export_shards",
    "export_weights",
    "find_damage",
    "headers",
    "inspect",
    "is_checkpoint",
    "last",
    "load_weights",
    "of_epoch",
    "prune",
    "rank_name",
    "remove",
    "snapshot",
    "value_here",
    "write",
]

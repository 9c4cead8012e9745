"""Composer's events and the place that each has in a torchweld run; plain names, no composer.

An event of Composer is a moment of its loop; a torchweld loop has fewer moments, chosen once, so
an algorithm is asked at the piece of :class:`torchweld.Parts` that runs at the same moment. An
event without such a piece is refused by name, never left out.
"""

from __future__ import annotations

from collections.abc import Collection

SURGERY = ("INIT", "BEFORE_LOAD")
"""Once, on the bare model, before the optimizer exists and before anything is wrapped."""

BATCH = ("AFTER_DATALOADER", "BATCH_START", "BEFORE_TRAIN_BATCH", "BEFORE_FORWARD")
"""A batch transform; the second and third only in the first micro-batch of a step."""

ONCE_A_STEP = frozenset({"BATCH_START", "BEFORE_TRAIN_BATCH"})

TARGETS = ("AFTER_FORWARD", "BEFORE_LOSS")
"""A target transform, between the model and the loss."""

LOSS = ("AFTER_LOSS", "BEFORE_BACKWARD")
"""Around the loss function."""

GRADS = ("AFTER_TRAIN_BATCH",)
"""A gradient transform: after the last backward of a step, before clipping."""

OPTIMIZER = ("AFTER_LOAD",)
"""An optimizer wrapper: the optimizer exists, nothing has been trained."""

STEP = ("BATCH_END", "BATCH_CHECKPOINT")
"""After every applied optimizer step."""

BORDER = (
    "FIT_START",
    "EPOCH_START",
    "EPOCH_END",
    "EPOCH_CHECKPOINT",
    "EVAL_START",
    "EVAL_END",
    "FIT_END",
)
"""A callback, at borders of the inner loop."""

PLACED = (*SURGERY, *OPTIMIZER, *BATCH, *TARGETS, *LOSS, *GRADS, *STEP, *BORDER)
"""Every event that has a place, in the order of a run."""


def refusal(name: str, events: Collection[str]) -> str:
    """The sentence that refuses the algorithm ``name`` for answering ``events``."""
    nowhere = sorted(event for event in events if event not in PLACED)
    if nowhere:
        return (
            f"{name} answers {', '.join(nowhere)} of Composer's events, and a torchweld loop has "
            f"no such moment; the events it has: {', '.join(PLACED)}"
        )
    return (
        f"{name} answers {', '.join(sorted(events))} now and did not when the run was planned, so "
        "these would be left out; let match() answer its events from the start, and apply() decide"
    )

"""The checkpoints that a run keeps, handed on to the run that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torchweld.callbacks import ModelCheckpoint
from torchweld.callbacks.model_checkpoint import Earlier
from torchweld.checkpoint import decode, headers

if TYPE_CHECKING:
    from torchweld.checkpoint import Checkpoint
    from torchweld.loop.run import TrainingRun
    from torchweld.processes.ranks import Ranks


def kept_names(run: TrainingRun) -> list[str]:
    """What the callbacks keep once the checkpoint of this step is there, as ``<run>/<name>``.

    One that the user saves with ``run.save()`` is not among them: it is the user's to remove.
    """
    savers = [c for c in run.wiring.callbacks if isinstance(c, ModelCheckpoint)]
    paths = {path for saver in savers for path in saver.kept}
    step, directory = run.position.step, run.directory
    if run.borders.preempted or any(saver.saved_step == step for saver in savers):
        assert directory is not None
        paths.add(directory / f"step-{step}")
    return sorted(f"{path.parent.name}/{path.name}" for path in paths)


def hand_on(run: TrainingRun, checkpoint: Checkpoint) -> None:
    """Let this run's callbacks go on with what the run before ``checkpoint`` kept."""
    earlier = _earlier(checkpoint, run.wiring.ranks)
    for callback in run.wiring.callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.go_on_from(earlier)


def _earlier(checkpoint: Checkpoint, ranks: Ranks) -> list[Earlier]:
    """Those that are still there, oldest first; rank 0 looks, so that all know the same."""
    found: list[tuple[str, int, dict[str, float]]] = []
    if ranks.rank == 0:
        root = checkpoint.path.parent.parent
        there = headers(root / name for name in checkpoint.header["kept"])
        found = [
            (str(path), header["step"], decode(header["metrics"], {})) for path, header in there
        ]
    texts = ranks.exchange("earlier checkpoints", json.dumps(found))
    known = [Earlier(Path(path), step, metrics) for path, step, metrics in json.loads(texts[0])]
    return sorted(known, key=lambda one: one.step)

"""What has to hold of a checkpoint that is written beside the training, for any strategy.

Functions for ``run_ranks``: every rank returns what is wrong.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import SGD

from tests.core.killing import contents
from tests.core.small_runs import fit, forget, make_data, make_model, quiet_trainer, saved
from torchweld import use
from torchweld.callbacks import ModelCheckpoint
from torchweld.checkpoint import files, find_damage
from torchweld.loop.run import TrainingRun

STRATEGIES = {1: "single", 2: "ddp"}


@contextmanager
def held_writes(seconds: float | None = None) -> Iterator[threading.Event]:
    """Let the threads write nothing until the event is set, or for so many seconds."""
    gate, write = threading.Event(), files.write_tensors

    # The threads' alone: what the main one writes is not in question here.
    def held(
        path: Path, entries: Sequence[files.Entry], metadata: Mapping[str, str]
    ) -> files.Stamp:
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(seconds or 60) or seconds, "nobody opened the gate"
        return write(path, entries, metadata)

    files.write_tensors = held
    try:
        yield gate
    finally:
        gate.set()
        files.write_tensors = write


def prepare(
    root: str | Path, *, callbacks: Any = (), strategy: Any = None, **settings: Any
) -> TrainingRun:
    """A run for an own loop on as many processes as there are."""
    trainer = quiet_trainer(
        root,
        callbacks=[*callbacks] or ModelCheckpoint(every_n_epochs=None),
        strategy=strategy or STRATEGIES[int(os.environ.get("WORLD_SIZE", "1"))],
        **settings,
    )
    return trainer.prepare(
        make_model(), make_data(), loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1)
    )


def train(run: TrainingRun, steps: int) -> None:
    """A few steps of an own loop."""
    batches = run.batches()
    for _ in range(steps):
        inputs, targets = next(batches)
        run.backward(run.loss(run.model(inputs), targets))
        run.step()


def differences(root: str, strategy: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Compare checkpoints written beside the steps with those written between them.

    The threads are held back, so that a step was made before anything is on the disk.

    Returns:
        The checkpoints in which anything differs, or that are damaged.
    """
    for name, async_save in (("beside", True), ("between", False)):
        forget()
        keep = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, async_save=async_save)
        chosen = use(strategy, **(options or {}))
        with held_writes(0.05):
            fit(
                quiet_trainer(Path(root) / name, strategy=chosen, callbacks=keep), optimizer="adamw"
            )
    pairs = zip(saved(Path(root) / "beside"), saved(Path(root) / "between"), strict=True)
    wrong = [one.name for one, other in pairs if contents(one) != contents(other)]
    return wrong + [why for path in saved(Path(root) / "beside") for why in find_damage(path)]


def collectives_of_a_save(
    root: str, strategy: str, options: Mapping[str, Any] | None = None
) -> tuple[int, int, int]:
    """Count what comes to the process group of the training.

    Returns:
        Collectives of ``run.async_save()`` itself, then until the checkpoint is complete, and of
        one reduction, which must be 1: it shows that the counter counts.
    """
    with held_writes() as gate, prepare(root, strategy=use(strategy, **(options or {}))) as run:
        train(run, 2)
        group: Any = run.env.group
        counts = [group._get_sequence_number_for_group()]
        future = run.async_save()
        counts.append(group._get_sequence_number_for_group())
        gate.set()
        future.result()
        counts.append(group._get_sequence_number_for_group())
        dist.all_reduce(torch.ones(1), group=group)
        counts.append(group._get_sequence_number_for_group())
    first, second, third = (b - a for a, b in pairwise(counts))
    return first, second, third

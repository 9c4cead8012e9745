"""Runs that are killed while they save, and runs that go on elsewhere: for any strategy.

    assert killed_while_saving(tmp_path, "ddp", rounds=5) == []
    assert moved(tmp_path, [Leg("ddp", 2, until=5), Leg("single", 1, until=9)]) == []

What they return are the problems, each a line that can be read alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from tests.core.forking import Forks, forked_ranks
from tests.core.small_runs import left_over, saved
from torchweld import Trainer, use
from torchweld.callbacks import ModelCheckpoint
from torchweld.checkpoint import Checkpoint, find_damage, last

GLOBAL_BATCH = 8
NUM_SAMPLES = 48  # 6 steps an epoch
_SAVE_SECONDS = 0.05  # about what one takes here
_PATIENCE_SECONDS = 240.0


Job = Callable[["Leg", float, str | None], None]
"""``(leg, dropout, ckpt_path)``: writes checkpoints below ``runs/``, where it is started."""


@dataclass(frozen=True)
class Leg:
    """A part of a run: on how many processes, under which strategy, up to which step."""

    strategy: str
    world_size: int
    until: int
    options: Mapping[str, Any] = field(default_factory=dict)
    job: Job | None = None  # what a rank does; None: train, below

    def __str__(self) -> str:
        """``ddp(…) on 2 to step 5``."""
        return f"{self.strategy}({dict(self.options) or ''}) on {self.world_size} to {self.until}"


# ---- the run -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A net large enough for its checkpoints to take a while; notes the samples it trains on."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(
            nn.Linear(6, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Dropout(dropout),
            nn.Linear(256, 3),
        )  # fmt: skip
        self.seen: list[list[float]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(inputs[:, 0].tolist())
        out: Tensor = self.layers(inputs)
        return out


def _make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_SAMPLES, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (NUM_SAMPLES,), generator=generator))


def train(leg: Leg, dropout: float, ckpt_path: str | None) -> None:
    """Be one rank of ``leg``; writes ``runs/`` and ``seen-<rank>.json`` where it is started."""
    torch.set_num_threads(1)
    model = Net(dropout)
    trainer = Trainer(
        strategy=use(leg.strategy, **leg.options),
        data=use("torch", batch_size=GLOBAL_BATCH // leg.world_size),
        default_root_dir="runs",
        callbacks=ModelCheckpoint(every_n_train_steps=2, async_save=True),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=leg.until,
        seed=3,
    )
    trainer.fit(
        model, _make_data(), loss=F.cross_entropy, optimizer=partial(AdamW, lr=1e-3),
        ckpt_path=ckpt_path,
    )  # fmt: skip
    Path(f"seen-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(model.seen))


def _finished(place: Path, leg: Leg, dropout: float, ckpt_path: str | None) -> Path:
    """Run ``leg`` to its end and return its newest checkpoint."""
    place.mkdir(exist_ok=True)
    words = (leg, dropout, ckpt_path)
    job = leg.job or train
    with forked_ranks(job, leg.world_size, *words, directory=place) as processes:
        codes = processes.codes(_PATIENCE_SECONDS)
        assert codes == [0] * leg.world_size, f"{leg}: {codes}\n{_said(processes)}"
    found, skipped = last(place / "runs")
    assert found is not None
    assert skipped == []
    return found


def _said(processes: Forks) -> str:
    ranks = range(len(processes.processes))
    return "\n".join(f"rank {rank}: {processes.output(rank)}" for rank in ranks)


# ---- kill -9 -------------------------------------------------------------------------------------


def killed_while_saving(
    directory: Path,
    strategy: str,
    options: Mapping[str, Any] | None = None,
    *,
    world_size: int = 2,
    rounds: int = 5,
    steps: int = 24,
    job: Job | None = None,
) -> list[str]:
    """Kill all ranks, or one of them, while a checkpoint is written beside the training.

    Each round prints its seed. Afterwards there has to be a complete checkpoint, nothing under a
    checkpoint's name may be damaged, and a run resumed from the newest has to end in the state of
    an undisturbed run, bit for bit: weights, optimizer, random states, position.

    Args:
        directory: an empty one.
        strategy: name of the strategy.
        options: of the strategy.
        world_size: number of processes.
        rounds: how many runs are killed.
        steps: optimizer steps of a run, with a checkpoint after every second.
        job: what a rank does; None: it trains a small net.
    """
    leg = Leg(strategy, world_size, steps, options or {}, job)
    expected = contents(_finished(directory / "whole", leg, 0.2, None))
    problems: list[str] = []
    in_flight = 0
    for number in range(rounds):
        seed = random.SystemRandom().randrange(2**32)
        place = directory / f"round-{number}"
        place.mkdir()
        who, unfinished, found = _kill(place, leg, random.Random(seed))
        in_flight += bool(unfinished)
        found += _problems_after(place, leg, expected)
        print(
            f"round {number}: seed {seed}, killed {who}, unfinished {unfinished}: {found or 'ok'}"
        )
        problems += [f"round {number}, seed {seed}, killed {who}: {line}" for line in found]
        if not found:
            shutil.rmtree(place)
    print(f"{in_flight} of {rounds} runs were killed while a checkpoint was being written")
    return problems


def _kill(place: Path, leg: Leg, rng: random.Random) -> tuple[str, list[str], list[str]]:
    """Kill a run in a random moment of a random save after the first.

    Returns:
        Whom, what was unfinished then, and the ranks that did not end by it.
    """
    who = rng.choice(["all", *map(str, range(leg.world_size))])
    killed = [rank for rank in range(leg.world_size) if who in {"all", str(rank)}]
    job = leg.job or train
    with forked_ranks(job, leg.world_size, leg, 0.2, None, directory=place) as processes:
        wait_for_save(place / "runs", processes, rng.randrange(4))
        time.sleep(rng.uniform(0, _SAVE_SECONDS))
        unfinished = left_over(place / "runs")
        for rank in killed:
            processes.kill(rank)
        codes = processes.codes(_PATIENCE_SECONDS)
    ends = {rank: -signal.SIGKILL if rank in killed else 1 for rank in range(leg.world_size)}
    # A run that came to its end first is one that was killed after its last step.
    finished = set(codes) == {0}
    wrong = [rank for rank, code in enumerate(codes) if code != ends[rank] and not finished]
    return who, unfinished, [f"rank {r} ended with {codes[r]}, not {ends[r]}" for r in wrong]


def wait_for_save(runs: Path, processes: Forks, number: int) -> None:
    """Wait until a checkpoint is complete and ``number`` further saves have begun."""
    begun: set[str] = set()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while processes.processes[0].is_alive() and time.monotonic() < deadline:
        if saved(runs):
            begun |= {path.name for path in runs.glob("*/.step-*.part")}
        if len(begun) > number:
            return
        time.sleep(0.001)


def _problems_after(place: Path, leg: Leg, expected: Any) -> list[str]:
    found, skipped = last(place / "runs")
    if found is None:
        return ["no complete checkpoint is left"]
    problems = [f"{skip.path} is damaged: {skip.reason}" for skip in skipped]
    problems += [f"{path}: {why}" for path in saved(place / "runs") for why in find_damage(path)]
    again = contents(_finished(place, leg, 0.2, "last"))
    if again != expected:
        wrong = [name for name in expected if expected[name] != again.get(name)]
        problems.append(f"resumed from {found.name} it ends with another {wrong[:5]}")
    return problems


def contents(path: Path) -> dict[str, Any]:
    """Return all that is in a checkpoint but its plan and what depends on the time."""
    checkpoint = Checkpoint.open(path)
    of_its_run = {"plan", "metrics", "kept"}
    header = {k: v for k, v in checkpoint.header.items() if k not in of_its_run}
    ranks = range(checkpoint.manifest["world_size"])
    states = {f"state of rank {rank}": checkpoint.rank_state(rank) for rank in ranks}
    tensors = {name: checkpoint.tensor(name).tolist() for name in sorted(checkpoint.names())}
    return {"header": header, **states, **tensors}


# ---- elsewhere -----------------------------------------------------------------------------------


def moved(directory: Path, legs: Sequence[Leg], *, tolerance: float = 1e-5) -> list[str]:
    """Run ``legs`` one after the other, each from the last checkpoint of the one before.

    Compared with the first leg's strategy undisturbed to the end: every step has to train on the
    same samples, and the weights and the optimizer's state have to be as close as ``tolerance``
    (largest absolute difference).

    Args:
        directory: an empty one.
        legs: of one run; the processes share batches of 8, so 1, 2, 4 or 8 of them.
        tolerance: 0.0 for bitwise.
    """
    whole = Leg(legs[0].strategy, legs[0].world_size, legs[-1].until, legs[0].options)
    end = _finished(directory / "whole", whole, 0.0, None)
    expected = _samples(directory / "whole", whole)
    seen: list[list[float]] = []
    for number, leg in enumerate(legs):
        path = _finished(directory / "parts", leg, 0.0, "last" if number else None)
        seen += _samples(directory / "parts", leg)
    problems = [
        f"step {step} trained on {sorted(set(mine) - set(theirs))}, not in the whole run's"
        for step, (mine, theirs) in enumerate(zip(seen, expected, strict=False), 1)
        if mine != theirs
    ]
    if len(seen) != len(expected):
        problems.append(f"{len(seen)} steps instead of {len(expected)}")
    return problems + _far(path, end, tolerance)


def _samples(place: Path, leg: Leg) -> list[list[float]]:
    """The samples of each step over all ranks, in order of their value."""
    files = [place / f"seen-{rank}.json" for rank in range(leg.world_size)]
    ranks = [json.loads(file.read_text()) for file in files]
    return [sorted(value for part in step for value in part) for step in zip(*ranks, strict=True)]


def _far(path: Path, other: Path, tolerance: float) -> list[str]:
    mine, theirs = Checkpoint.open(path), Checkpoint.open(other)
    names = {name for name in theirs.names() if name.startswith(("model/", "optim/"))}
    lacking = names ^ {name for name in mine.names() if name.startswith(("model/", "optim/"))}
    if lacking:
        return [f"only one of the two has {sorted(lacking)[:5]}"]
    distances = {n: (mine.tensor(n) - theirs.tensor(n)).abs().max().item() for n in names}
    worst = max(distances, key=distances.__getitem__)
    print(f"largest difference {distances[worst]:.2g}, in {worst}")
    if distances[worst] <= tolerance:
        return []
    return [f"{worst} differs by {distances[worst]:.3g}, more than {tolerance:g}"]

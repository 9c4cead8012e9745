"""A process that is killed at any moment leaves whole checkpoints only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from torchweld.checkpoint import checkpoints, find_damage, last

# The timer's signal ends a process as kill -9 does: no handler, no clean-up.
PROGRAM = """
import itertools, os, random, signal, sys
from pathlib import Path
import torch
from torchweld.checkpoint import prune, complete, write
from torchweld.interfaces import Shard

def train(run: Path, seed: int) -> None:
    shard = Shard("model/w", torch.ones(20_000), (20_000,), (0,))
    write(run / "step-0", shards=[shard], header={})
    signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(0.001, 0.06))
    for step in itertools.count(1):
        write(run / f"step-{step % 5}", shards=[shard], header={"step": step})
        prune(complete(run), keep=3)

torch.set_num_threads(1)
for seed in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        train(Path(sys.argv[1]) / f"run-{seed}", seed)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGALRM, status
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("kills", [25, pytest.param(500, marks=pytest.mark.soak)])
def test_killed_writer_leaves_whole_checkpoints_only(tmp_path: Path, kills: int) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), str(kills)], check=True)

    damage = {path: find_damage(path) for path in checkpoints(tmp_path)}
    found, skipped = last(tmp_path)

    assert len({path.parent for path in damage}) == kills
    assert not any(damage.values())
    assert (found in damage, skipped) == (True, [])

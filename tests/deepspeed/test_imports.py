"""Nothing heavy for a plan; nothing compiled, printed or left behind for a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchweld.testing import spawn_ranks
from torchweld.testing.rank_processes import free_port

PLANNING = """
import sys
import torchweld_deepspeed
from torchweld.planning import make_plan
from torchweld.registry import Registry
registry = Registry({"deepspeed": torchweld_deepspeed})
for name in ("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2_offload", "deepspeed_stage_3"):
    make_plan(registry, strategy=name, data="torch").explain()
print([name for name in ("torch", "deepspeed", "numpy") if name in sys.modules])
"""

TRAINING = """
import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from torchweld import Trainer, use
from torchweld.testing import models

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)  # DeepSpeed's launcher passes it
parser.add_argument("--stages", type=int, nargs="+", default=[2, 2])
parser.add_argument("--verbose", action="store_true")
args = parser.parse_args()
for stage in args.stages:
    trainer = Trainer(
        strategy=use("deepspeed", stage=stage, verbose=args.verbose),
        data=use("torch", batch_size=4),
        accelerator="cpu",
        max_epochs=1,
        barebones=True,
    )
    data = TensorDataset(*models.features(16))
    result = trainer.fit(
        models.mlp(), data, loss=F.cross_entropy, optimizer=partial(torch.optim.AdamW, lr=1e-2)
    )
    # In one piece: print() writes several, between which another process can write.
    sys.stdout.write(f"steps {result.progress.step}\\n")
"""


def test_listing_and_planning_import_nothing_heavy() -> None:
    command = [sys.executable, "-W", "error", "-c", PLANNING]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def said(output: str) -> list[str]:
    """The words of all lines but those with which gloo of some torch, 2.9 for one, begins."""
    return [
        w for line in output.splitlines() if not line.startswith("[Gloo]") for w in line.split()
    ]


def test_two_fits_run_without_a_compiler_and_without_a_word(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    nowhere = {"PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    for stages in ("12", "33"):
        arguments = ("--local_rank=0", "--stages", *stages)
        with spawn_ranks(script, 2, *arguments, directory=tmp_path, environ=nowhere) as ranks:
            codes = ranks.wait(timeout_seconds=240)
            outputs = [ranks.output(rank) for rank in (0, 1)]

        assert codes == (0, 0), outputs
        assert [said(output) for output in outputs] == [["steps", "2"] * 2] * 2


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=outside(), cwd=tmp_path
    )

    assert (done.returncode, said(done.stdout), done.stderr) == (0, ["steps", "4"] * 2, "")


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "deepspeed": ("deepspeed.launcher.runner", "--num_gpus=2"),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_starts_the_script_in_two_processes(name: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    port = [f"--master_port={free_port()}"] if name == "deepspeed" else []
    command = [
        sys.executable,
        "-m",
        *LAUNCHERS[name],
        *port,
        str(script),
        "--stages=2",
        "--verbose",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=outside(), cwd=tmp_path
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("steps 2\n") == 2
    # What verbose=True shows is DeepSpeed's own log.
    assert "[Rank 0] Creating torch.float32 ZeRO stage 2 optimizer" in done.stdout + done.stderr
    assert "built successfully" not in done.stdout
    assert "Warning" not in done.stderr


def outside() -> dict[str, str]:
    """The environment without the place of a process in a launch."""
    place = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in place}

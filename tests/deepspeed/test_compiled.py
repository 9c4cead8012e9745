"""What DeepSpeed compiles at its first use: its Adam for host memory, and its access to a drive."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.deepspeed.runs import (
    Training,
    branching_steps,
    by_engine,
    by_hand,
    by_zero,
    told,
    training_of,
)
from torchweld.errors import RunError
from torchweld.testing import models, run_ranks
from torchweld.testing.processes import RanksFailed

COMPILES = bool(shutil.which("g++") and shutil.which("ninja"))
COMPILING_SECONDS = 900.0


def without_compiler(options: dict[str, Any]) -> str:
    path, os.environ["PATH"] = os.environ["PATH"], ""
    try:
        by_zero(training_of("mlp"), options)
    except RunError as error:
        return str(error)
    finally:
        os.environ["PATH"] = path
    return "trained"


@pytest.mark.parametrize(
    ("options", "said", "fix"),
    [
        ({"cpu_adam": True, "offload_optimizer": "cpu"}, "cpu_adam=True", "leave cpu_adam out"),
        ({"offload_optimizer": "nvme", "nvme_path": "."}, "'nvme'", "offload to 'cpu'"),
    ],
    ids=["cpu_adam", "nvme"],
)
def test_it_is_refused_where_it_cannot_be_compiled(
    options: dict[str, Any], said: str, fix: str
) -> None:
    (answer,) = run_ranks(without_compiler, 1, {"stage": 3, **options}, timeout_seconds=240)

    assert said in answer
    assert fix in answer
    assert "\n" not in answer


@pytest.mark.soak
@pytest.mark.skipif(not COMPILES, reason="needs g++ and ninja")
@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_adam_trains_as_torchs_does(stage: int) -> None:
    training = training_of("mlp")
    options = {"stage": stage, "offload_optimizer": "cpu", "cpu_adam": True}
    expected = run_ranks(by_hand, 2, training, timeout_seconds=COMPILING_SECONDS)

    found = run_ranks(by_zero, 2, training, options, timeout_seconds=COMPILING_SECONDS)

    # It rounds in another order: 1.7e-5 was measured.
    assert found[0].losses == pytest.approx(expected[0].losses, abs=1e-4)


def has_libaio() -> bool:
    """Whether what reads and writes a drive can be linked."""
    program = "int main() { return 0; }"
    command = ["g++", "-x", "c++", "-", "-laio", "-o", os.devnull]
    return (
        COMPILES
        and not subprocess.run(
            command, input=program.encode(), check=False, capture_output=True
        ).returncode
    )


@pytest.mark.soak
@pytest.mark.skipif(not has_libaio(), reason="needs g++, ninja and libaio-dev")
def test_what_waits_on_a_drive_trains_as_in_memory(tmp_path: Path) -> None:
    training = training_of("mlp")
    drive = {"offload_optimizer": "nvme", "offload_params": "nvme", "nvme_path": str(tmp_path)}
    expected = run_ranks(by_hand, 2, training, timeout_seconds=COMPILING_SECONDS)

    job = partial(by_zero, keeps_state=False)
    found = run_ranks(job, 2, training, {"stage": 3, **drive}, timeout_seconds=COMPILING_SECONDS)

    assert found[0].losses == pytest.approx(expected[0].losses, abs=1e-4)
    with pytest.raises(RanksFailed, match="on the drive between two steps"):
        run_ranks(by_zero, 2, training, {"stage": 3, **drive}, timeout_seconds=COMPILING_SECONDS)


class Wide(models.Branching):
    """Wide enough for both halves of its branch to go to the drive: 1 MiB and more each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(models.NUM_FEATURES, width)
        self.side = nn.Linear(width, width)
        self.head = nn.Linear(width, models.NUM_CLASSES)


@pytest.mark.soak
@pytest.mark.skipif(not has_libaio(), reason="needs g++, ninja and libaio-dev")
@pytest.mark.parametrize("more", [{}, {"offload_params": "nvme"}], ids=["optimizer", "both"])
def test_a_gradient_of_an_earlier_step_is_not_read_from_the_drive(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    training = Training(partial(Wide, 768), branching_steps(), clip=None)
    drive = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path / "here"), **more}
    alone = told(3, offload_optimizer={"device": "nvme", "nvme_path": str(tmp_path / "alone")})
    run = partial(run_ranks, timeout_seconds=COMPILING_SECONDS)
    expected = run(partial(by_hand, zeros=True), 2, training)

    found = run(partial(by_zero, keeps_state=False), 2, training, {"stage": 3, **drive})
    stale = run(by_engine, 2, training, alone)

    assert any((tmp_path / "here").rglob("*_gradient_*"))
    assert found[0].losses == pytest.approx(expected[0].losses, abs=1e-6)
    assert stale[0].losses != pytest.approx(expected[0].losses, abs=1e-4)


@pytest.mark.soak
@pytest.mark.skipif(not has_libaio(), reason="needs g++, ninja and libaio-dev")
def test_a_gradient_that_is_not_read_back_from_the_drive_is_refused(tmp_path: Path) -> None:
    steps = tuple(replace(step, forward={"branch": True}) for step in branching_steps())
    training = Training(partial(Wide, 800), steps, clip=None)
    drive = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path / "here")}
    alone = told(3, offload_optimizer={"device": "nvme", "nvme_path": str(tmp_path / "alone")})
    run = partial(run_ranks, timeout_seconds=COMPILING_SECONDS)
    expected = run(by_hand, 2, training)

    wrong = run(by_engine, 2, training, alone)

    # Every parameter is used in every step.
    assert wrong[0].losses != pytest.approx(expected[0].losses, abs=1e-4)
    with pytest.raises(RanksFailed, match=r"'side\.weight' back from the drive.* byte 54400"):
        run(partial(by_zero, keeps_state=False), 2, training, {"stage": 3, **drive})

"""Which process this is, by whatever started it; and ``torchweld launch``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from tests.core.forking import forked_ranks
from tests.core.scripts import train_and_fail
from tests.core.test_failures import assert_saved_whole
from torchweld.cli import main
from torchweld.cli.launched import prepare
from torchweld.errors import RunError
from torchweld.processes.variables import first_host, slurm_variables
from torchweld.testing import run_ranks
from torchweld.testing.rank_processes import free_port

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_NODELIST": "login,gpu[07-08]",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


# ---- SLURM ---------------------------------------------------------------------------------------


def test_a_task_of_a_slurm_step_gets_what_torchrun_would_set() -> None:
    assert slurm_variables(TASK) == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(15000 + (4711 * 31 + 2) % 15000),
    }


def test_a_master_that_the_user_names_is_kept() -> None:
    found = slurm_variables({**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29400"})

    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "29400")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**TASK, "RANK": "0", "WORLD_SIZE": "8"},  # torchrun as the one task of a node
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {key: value for key, value in TASK.items() if "STEP" not in key},  # a batch script
        {key: value for key, value in TASK.items() if key != "SLURM_PROCID"},  # a shell in salloc
    ],
    ids=["elsewhere", "torchrun", "one task", "batch script", "salloc"],
)
def test_slurm_decides_nothing_outside_a_step_of_several_tasks(environ: dict[str, str]) -> None:
    assert slurm_variables(environ) == {}


def test_a_step_that_does_not_say_its_hosts_is_an_error_with_the_way_out() -> None:
    task = {key: value for key, value in TASK.items() if "NODELIST" not in key}

    with pytest.raises(RunError, match="set MASTER_ADDR"):
        slurm_variables(task)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a-1,b-2", "a-1"),
        ("n[003-010]", "n003"),
        ("n[7,9],m", "n7"),
        ("r[1-2]n[4]", "r1n4"),
    ],
)
def test_the_first_host_of_a_list_is_found(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def _train_as_task(number: int, port: int) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(
        TASK, SLURM_STEP_NODELIST="localhost", SLURM_JOB_NODELIST="localhost", MASTER_PORT=str(port)
    )
    os.environ.update(SLURM_PROCID=str(number), SLURM_LOCALID=str(number))
    train_and_fail.main("none", "die", "0", "runs")
    print("rank", os.environ["RANK"], "of", dist.get_world_size())


def _as_task(port: int) -> None:
    _train_as_task(int(os.environ["RANK"]), port)


def test_tasks_of_a_slurm_step_train_together(tmp_path: Path) -> None:
    with forked_ranks(_as_task, 2, free_port(), directory=tmp_path) as tasks:
        codes = tasks.codes()
        ends = [tasks.output(rank).splitlines()[-2:] for rank in range(2)]

    assert codes == [0, 0]
    assert ends[0][0] == ends[1][0]  # the weights
    assert [end[1] for end in ends] == ["rank 0 of 2", "rank 1 of 2"]


# ---- torchweld launch ----------------------------------------------------------------------------


def _launch(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", "torchweld", "launch", *words],
        cwd=directory,
        env={**environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_launch_shares_out_the_cores_and_keeps_the_users_words() -> None:
    cores = len(os.sched_getaffinity(0))
    words = ["--nproc-per-node=2", "train.py", "--nnodes", "2"]

    given, added = prepare(words, {})

    assert given == ["--standalone", *words]
    assert added == {"OMP_NUM_THREADS": str(max(1, cores // 2))}


@pytest.mark.parametrize("meets", ["--rdzv-endpoint=a:1", "--rdzv_backend=c10d", "--standalone"])
def test_launch_leaves_alone_what_the_user_has_said(meets: str) -> None:
    words = [meets, "--nproc_per_node", "2", "-m", "train"]

    assert prepare(words, {"OMP_NUM_THREADS": "7"}) == (words, {})


def test_launch_shows_its_help_without_words() -> None:
    shown = CliRunner().invoke(main, ["launch"])

    assert shown.exit_code == 0
    assert "torchrun --help" in shown.output


@pytest.mark.slow
def test_launch_starts_a_script_and_a_sigterm_to_it_ends_in_a_checkpoint(tmp_path: Path) -> None:
    script = str(Path(train_and_fail.__file__))
    words = ["--nproc-per-node", "2", script, "forward", "terminate_launcher", "0", "runs"]

    ended = _launch(tmp_path, *words)

    assert ended.returncode == 1  # torchrun's own: the processes' codes are in its report
    assert "torchweld launch: OMP_NUM_THREADS=" in ended.stderr
    assert "SIGTERM ended the run after step 5" in ended.stdout + ended.stderr
    assert_saved_whole(tmp_path / "runs", "step-5")


# ---- a process group that is there already -------------------------------------------------------


def _train_in_a_group() -> bool:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    train_and_fail.main("none", "die", "0", "runs")
    told = torch.ones(1)
    dist.all_reduce(told)
    return dist.group.WORLD is group and told.item() == 2


def test_a_process_group_of_the_user_is_used_and_left_as_it_is() -> None:
    assert run_ranks(_train_in_a_group, 2) == [True, True]

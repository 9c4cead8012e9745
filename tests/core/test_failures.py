"""When one process stops, all do, soon, with its reason, and what was saved stays whole."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.core.forking import Forks, forked_ranks
from tests.core.scripts import train_and_fail
from tests.core.small_runs import left_over, saved
from torchweld.checkpoint import last
from torchweld.processes.whereabouts import raised_at

SOON = 60.0  # seconds, on any machine: 0.3 to 1.5 on an idle one; a collective waits half an hour
PATIENCE_SECONDS = 240.0


def launched(
    directory: Path, *words: str, world_size: int = 2, **environ: str
) -> AbstractContextManager[Forks]:
    """Processes of ``train_and_fail``, which write below ``directory / "runs"``."""
    words = (*words[:3], str(directory / "runs"), *words[3:])
    return forked_ranks(
        train_and_fail.main, world_size, *words, directory=directory, environ=environ
    )


def wait_for_harm(directory: Path, *ranks: int) -> float:
    """Wait until ``ranks`` have come to harm; returns when."""
    places = [directory / f"harmed-{rank}" for rank in ranks]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(place.exists() and place.read_text() for place in places):
        assert time.monotonic() < deadline, "nothing has happened"
        time.sleep(0.02)
    return max(float(place.read_text()) for place in places)


def assert_saved_whole(root: Path, newest: str = "step-4") -> Path:
    """Everything under ``root`` is a whole checkpoint, and ``newest`` is what ``last`` takes."""
    found, skipped = last(root)
    assert skipped == []
    assert found is not None
    assert found.name == newest
    assert left_over(root) == []
    return found


# ---- a rank that hangs ---------------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_hangs_is_shown_where_it_is(who: int, tmp_path: Path) -> None:
    with launched(tmp_path, "data", "wait", str(who), TORCHWELD_HANG_SECONDS="2") as launch:
        codes = launch.codes()
        seconds = time.time() - wait_for_harm(tmp_path, who)

    assert codes == [1, 1]
    assert seconds < 2 + 2 * SOON  # the one that hangs has ten seconds to hear of it
    told = launch.output(1 - who)
    assert f"RankFailed: rank {1 - who} waited in vain for the others in step 5" in told
    assert f"rank {who} is at: step 5, train_and_fail.py:" in told
    assert "in wait" in told
    assert f"rank {who} is at: step 5" in launch.output(who)


# ---- an exception on one rank --------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("place", "doing", "newest"),
    [
        ("forward", "step 5", "step-4"),
        ("data", "step 5", "step-4"),
        ("callback at step 5", "step 5", "step-4"),
        ("validation", "validation", "step-8"),
    ],
    ids=lambda value: value.split()[0],
)
def test_an_exception_on_one_rank_ends_all_with_its_reason(
    place: str, doing: str, newest: str, who: int, tmp_path: Path
) -> None:
    with launched(tmp_path, place, "raise_error", str(who)) as launch:
        codes = launch.codes()
        seconds = time.time() - wait_for_harm(tmp_path, who)

    assert codes == [1, 1]
    assert seconds < SOON
    assert "ValueError: the sample is broken" in launch.output(who)
    told = launch.output(1 - who)
    assert f"RankFailed: rank {who} stopped in {doing}: ValueError: the sample is broken\n" in told
    raised = told.partition("raised in, innermost last:\n")[2]
    assert re.search(r'File ".*train_and_fail\.py", line \d+, in act\n', raised)
    assert re.search(r'File ".*train_and_fail\.py", line \d+, in raise_error\n', raised)
    if place != "validation":  # of which the first is before the first checkpoint
        path = assert_saved_whole(tmp_path / "runs", newest)
        assert f"last complete checkpoint: {path} (intact); resume with ckpt_path='last'" in told


def test_what_is_told_of_an_error_inside_torch_is_the_users_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(nn.Linear(5, 3))(torch.ones(2, 4))

    told = raised_at(caught.value)
    assert f'File "{__file__}", line ' in told
    assert "nn.Sequential(nn.Linear(5, 3))" in told
    assert "_call_impl" not in told


@pytest.mark.parametrize("who", [0, 1])
def test_one_rank_that_leaves_ends_all(who: int, tmp_path: Path) -> None:
    with launched(tmp_path, "forward", "leave", str(who)) as launch:
        codes = launch.codes()

    assert (codes[who], codes[1 - who]) == (3, 1)
    assert f"rank {who} stopped in step 5: SystemExit: 3" in launch.output(1 - who)
    assert_saved_whole(tmp_path / "runs")


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("place", ["forward", "callback at step 5", "callback at step 6"])
def test_one_rank_that_is_killed_ends_all_and_is_named(
    place: str, who: int, tmp_path: Path
) -> None:
    with launched(tmp_path, place, "die", str(who)) as launch:
        codes = launch.codes()
        seconds = time.time() - wait_for_harm(tmp_path, who)

    assert (codes[who], codes[1 - who]) == (-signal.SIGKILL, 1)
    assert seconds < SOON
    assert f"RankFailed: rank {who} is gone: its process ended" in launch.output(1 - who)
    assert_saved_whole(tmp_path / "runs")
    assert "(intact); resume with ckpt_path='last'" in launch.output(1 - who)


@pytest.mark.parametrize("who", [0, 1])
def test_ranks_end_also_where_the_one_that_failed_goes_on_with_something_else(
    who: int, tmp_path: Path
) -> None:
    words = (tmp_path, "forward", "raise_and_stay", str(who))
    with launched(*words, TORCHWELD_TIMEOUT_SECONDS="2") as launch:
        harmed = wait_for_harm(tmp_path, who)
        launch.processes[1 - who].join(PATIENCE_SECONDS)
        seconds = time.time() - harmed
        code = launch.processes[1 - who].exitcode

    assert code == 1
    assert seconds < SOON
    assert f"torchweld: rank {who} stopped in step 5: ArithmeticError" in launch.output(1 - who)
    assert_saved_whole(tmp_path / "runs")


def test_a_checkpoint_that_cannot_be_written_ends_all_with_the_reason(tmp_path: Path) -> None:
    with launched(tmp_path, "callback at step 5", "block_checkpoints", "0") as launch:
        codes = launch.codes()

    assert codes == [1, 1]
    for rank in range(2):
        assert "step-6 was not written - rank 0: " in launch.output(rank)
    assert_saved_whole(tmp_path / "runs")


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_dies_before_it_arrives_is_named(who: int, tmp_path: Path) -> None:
    words = (tmp_path, "before", "die", str(who))
    with launched(*words, TORCHWELD_TIMEOUT_SECONDS="2") as launch:
        codes = launch.codes()

    assert (codes[who], codes[1 - who]) == (-signal.SIGKILL, 1)
    assert f"RankMissing: rank {who} of 2 did not arrive at" in launch.output(1 - who)


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in whose ``runs`` there is room for 200 kB."""
    runs = tmp_path / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(runs)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(runs)], check=True)


@pytest.mark.parametrize("logger", ["", "1"], ids=["saving", "logging and saving"])
def test_a_full_disk_ends_all_ranks_with_the_reason(logger: str, small_disk: Path) -> None:
    with launched(small_disk, "callback at step 5", "fill_disk", "0", LOGGER=logger) as launch:
        codes = launch.codes()

    assert codes == [1, 1]
    for rank in range(2):
        assert "No space left on device" in launch.output(rank)
    assert_saved_whole(small_disk / "runs")


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["0", "1", "all"])
@pytest.mark.parametrize("place", ["forward", "callback at step 6"])
def test_ctrl_c_ends_all_ranks(place: str, who: str, tmp_path: Path) -> None:
    with launched(tmp_path, place, "wait", who) as launch:
        wait_for_harm(tmp_path, *(range(2) if who == "all" else [int(who)]))
        sent = time.time()
        launch.send(signal.SIGINT)
        codes = launch.codes()
        seconds = time.time() - sent

    assert 0 not in codes
    assert None not in codes
    assert seconds < SOON
    assert "KeyboardInterrupt" in launch.output(0 if who == "all" else int(who))
    assert_saved_whole(tmp_path / "runs")


def test_ctrl_c_on_one_rank_ends_the_others_with_that_reason(tmp_path: Path) -> None:
    with launched(tmp_path, "forward", "interrupt", "1") as launch:
        codes = launch.codes()

    assert 0 not in codes
    assert "rank 1 stopped in step 5: KeyboardInterrupt" in launch.output(0)
    assert_saved_whole(tmp_path / "runs")


# ---- torchrun ------------------------------------------------------------------------------------


def _torchrun(directory: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (directory / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, train_and_fail.__file__, *words, str(directory / "runs")],
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
def test_torchrun_ends_with_the_reason_of_the_rank_that_failed(tmp_path: Path) -> None:
    with _torchrun(tmp_path, "forward", "raise_error", "1") as torchrun:
        code = torchrun.wait(PATIENCE_SECONDS)

    output = (tmp_path / "output.txt").read_text()
    assert code == 1
    assert "ValueError: the sample is broken" in output
    assert_saved_whole(tmp_path / "runs")


@pytest.mark.slow
def test_torchrun_ends_all_ranks_on_ctrl_c(tmp_path: Path) -> None:
    with _torchrun(tmp_path, "callback at step 6", "wait", "0") as torchrun:
        while not (tmp_path / "harmed-0").exists():
            assert torchrun.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
        os.killpg(torchrun.pid, signal.SIGINT)
        code = torchrun.wait(PATIENCE_SECONDS)

    assert code != 0
    assert "KeyboardInterrupt" in (tmp_path / "output.txt").read_text()
    assert_saved_whole(tmp_path / "runs")


# ---- kill -9 at any moment -----------------------------------------------------------------------


def _kill_somewhere(place: Path, *resume: str, world_size: int) -> int:
    """Kill a run in a random moment after its first checkpoint; returns how many there are."""
    before = len(saved(place / "runs"))
    with launched(place, "none", "die", "0", *resume, world_size=world_size) as launch:
        while len(saved(place / "runs")) == before and launch.processes[0].is_alive():
            time.sleep(0.001)
        time.sleep(random.SystemRandom().uniform(0, 0.1))
        launch.send(signal.SIGKILL)
        launch.codes()
    return len(saved(place / "runs"))


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [1, 2])
def test_runs_killed_at_any_moment_come_to_the_same_end(world_size: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    with launched(tmp_path / "whole", "none", "die", "0", world_size=world_size) as launch:
        assert launch.codes() == [0] * world_size
        expected = launch.output(0).splitlines()[-1]

    for attempt in range(25):
        place = tmp_path / str(attempt)
        place.mkdir()
        _kill_somewhere(place, world_size=world_size)
        assert _kill_somewhere(place, "last", world_size=world_size) > 0
        with launched(place, "none", "die", "0", "last", world_size=world_size) as launch:
            assert launch.codes() == [0] * world_size
            assert launch.output(0).splitlines()[-1] == expected

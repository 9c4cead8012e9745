"""Shards when a process fails, is killed while it saves, or goes on elsewhere."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.core.killing import Leg, killed_while_saving, moved
from tests.core.test_failures import assert_saved_whole, launched

SHARDED = ["fsdp", "fairscale_oss", "fairscale_sdp"]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("place", ["forward", "data", "callback at step 5"])
def test_an_exception_on_one_rank_ends_all_with_its_reason(
    place: str, who: int, tmp_path: Path
) -> None:
    with launched(tmp_path, place, "raise_error", str(who), STRATEGY="fsdp") as launch:
        codes = launch.codes()

    assert codes == [1, 1]
    assert "ValueError: the sample is broken" in launch.output(who)
    told = launch.output(1 - who)
    assert f"RankFailed: rank {who} stopped in step 5: ValueError: the sample is broken" in told
    assert_saved_whole(tmp_path / "runs")


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("harm", ["die", "leave"])
def test_a_rank_that_is_gone_is_named_and_ends_all(harm: str, who: int, tmp_path: Path) -> None:
    with launched(tmp_path, "forward", harm, str(who), STRATEGY="fsdp") as launch:
        codes = launch.codes()

    gone = {"die": -signal.SIGKILL, "leave": 3}
    assert (codes[who], codes[1 - who]) == (gone[harm], 1)
    told = {"die": f"rank {who} is gone", "leave": f"rank {who} stopped in step 5: SystemExit: 3"}
    assert told[harm] in launch.output(1 - who)
    assert_saved_whole(tmp_path / "runs")


def test_a_rank_that_hangs_is_shown_where_it_is(tmp_path: Path) -> None:
    words = tmp_path, "data", "wait", "1"
    with launched(*words, STRATEGY="fsdp", TORCHWELD_HANG_SECONDS="2") as launch:
        codes = launch.codes()

    assert codes == [1, 1]
    told = launch.output(0)
    assert "RankFailed: rank 0 waited in vain for the others in step 5" in told
    assert "rank 1 is at: step 5, train_and_fail.py:" in told


@pytest.mark.slow
def test_five_runs_killed_at_random_moments_resume_bitwise(tmp_path: Path) -> None:
    assert killed_while_saving(tmp_path, "fsdp", rounds=5) == []


@pytest.mark.soak
@pytest.mark.parametrize("strategy", SHARDED)
def test_a_hundred_runs_killed_at_random_moments_resume_bitwise(
    strategy: str, tmp_path: Path
) -> None:
    assert killed_while_saving(tmp_path, strategy, rounds=100) == []


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes_and_with_more(tmp_path: Path) -> None:
    legs = [Leg("fsdp", 2, until=5), Leg("fsdp", 1, until=9), Leg("fsdp", 2, until=14)]

    assert moved(tmp_path, legs) == []


@pytest.mark.slow
@pytest.mark.parametrize("between", ["ddp", "fairscale_oss", "fairscale_sdp"])
def test_a_run_goes_on_under_another_strategy_and_back_bitwise(
    between: str, tmp_path: Path
) -> None:
    legs = [Leg("fsdp", 2, until=5), Leg(between, 2, until=9), Leg("fsdp", 2, until=14)]

    assert moved(tmp_path, legs, tolerance=0.0) == []

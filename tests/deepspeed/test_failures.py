"""Engines whose processes fail, are killed while they save, or go on elsewhere."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.core.killing import Leg, killed_while_saving, moved
from tests.core.test_failures import assert_saved_whole, launched

STAGE = {1: "deepspeed_stage_1", 2: "deepspeed_stage_2", 3: "deepspeed_stage_3"}


@pytest.mark.parametrize(
    ("stage", "place", "who"), [(1, "callback at step 5", 0), (2, "data", 0), (3, "forward", 1)]
)
def test_an_exception_on_one_rank_ends_all_with_its_reason(
    stage: int, place: str, who: int, tmp_path: Path
) -> None:
    with launched(tmp_path, place, "raise_error", str(who), STRATEGY=STAGE[stage]) as launch:
        codes = launch.codes()

    assert codes == [1, 1]
    assert "ValueError: the sample is broken" in launch.output(who)
    told = launch.output(1 - who)
    assert f"RankFailed: rank {who} stopped in step 5: ValueError: the sample is broken" in told
    assert_saved_whole(tmp_path / "runs")


@pytest.mark.parametrize(
    ("stage", "harm", "who", "told"),
    [
        (2, "leave", 0, "rank 0 stopped in step 5: SystemExit: 3"),
        (3, "die", 1, "rank 1 is gone"),
    ],
)
def test_a_rank_that_is_gone_is_named_and_ends_all(
    stage: int, harm: str, who: int, told: str, tmp_path: Path
) -> None:
    with launched(tmp_path, "forward", harm, str(who), STRATEGY=STAGE[stage]) as launch:
        codes = launch.codes()

    gone = {"die": -signal.SIGKILL, "leave": 3}
    assert (codes[who], codes[1 - who]) == (gone[harm], 1)
    assert told in launch.output(1 - who)
    assert_saved_whole(tmp_path / "runs")


def test_a_rank_that_hangs_is_shown_where_it_is(tmp_path: Path) -> None:
    words = tmp_path, "data", "wait", "1"
    with launched(*words, STRATEGY=STAGE[3], TORCHWELD_HANG_SECONDS="2") as launch:
        codes = launch.codes()

    assert codes == [1, 1]
    told = launch.output(0)
    assert "RankFailed: rank 0 waited in vain for the others in step 5" in told
    assert "rank 1 is at: step 5, train_and_fail.py:" in told


@pytest.mark.slow
def test_runs_killed_at_random_moments_resume_bitwise(tmp_path: Path) -> None:
    assert killed_while_saving(tmp_path, "deepspeed", {"stage": 3}, rounds=2) == []


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGE)
def test_many_runs_killed_at_random_moments_resume_bitwise(stage: int, tmp_path: Path) -> None:
    assert killed_while_saving(tmp_path, "deepspeed", {"stage": stage}, rounds=30) == []


@pytest.mark.slow
def test_a_run_goes_on_at_another_stage_on_fewer_processes_and_without_deepspeed(
    tmp_path: Path,
) -> None:
    legs = [
        Leg("deepspeed", 2, until=5, options={"stage": 2}),
        Leg("deepspeed", 1, until=9, options={"stage": 3}),
        Leg("ddp", 2, until=14),
    ]

    assert moved(tmp_path, legs) == []

"""run_ranks and spawn_ranks: what comes back, in which order, and what stays behind."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from torchweld.errors import InvalidArgument
from torchweld.testing import run_ranks
from torchweld.testing.processes import RankPool, RanksFailed, spawn_ranks


class Odd(Exception):
    """Cannot be made again from a pickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class Box:
    """A class of this module, to travel in both directions."""

    def __init__(self, value: int) -> None:
        self.value = value


def rank_and_box(box: Box) -> tuple[int, Box]:
    return int(os.environ["RANK"]), Box(box.value + 1)


def launch_variables() -> dict[str, str]:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    return {name: os.environ[name] for name in names}


def sum_of_ranks() -> float:
    torch.distributed.init_process_group("gloo")
    value = torch.tensor(float(os.environ["RANK"]) + 1)
    torch.distributed.all_reduce(value)
    return value.item()


def process_id() -> int:
    return os.getpid()


def disturb() -> None:
    os.environ["TORCHWELD_TEST_LEFT"] = "1"
    sys.path.insert(0, "/left")
    torch.set_num_threads(2)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    torch.distributed.init_process_group("gloo")
    os.chdir("/")


def state() -> tuple[object, ...]:
    left = os.environ.get("TORCHWELD_TEST_LEFT"), "/left" in sys.path, torch.get_num_threads()
    drawn = random.getstate()[1][0], str(np.random.get_state()), torch.initial_seed()
    return *left, *drawn, torch.distributed.is_initialized()


def write_and_list() -> list[str]:
    torch.distributed.init_process_group("gloo")
    Path(os.environ["RANK"]).touch()
    torch.distributed.barrier()
    return sorted(path.name for path in Path().iterdir())


def fail_on(failing: int) -> None:
    torch.distributed.init_process_group("gloo")
    if int(os.environ["RANK"]) == failing:
        raise ValueError("the first cause")
    torch.distributed.all_reduce(torch.zeros(1))


def hang_on(hanging: int) -> int:
    if int(os.environ["RANK"]) == hanging:
        threading.Event().wait()
    return os.getpid()


def die_on(dying: int) -> None:
    print("last words", flush=True)
    if int(os.environ["RANK"]) == dying:
        os.kill(os.getpid(), signal.SIGKILL)


def raise_odd() -> None:
    raise Odd("a", "b")


def leave() -> None:
    sys.exit(3)


def returns_a_lambda() -> object:
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_run_ranks_returns_the_results_by_rank(world_size: int) -> None:
    results = run_ranks(rank_and_box, world_size, Box(6))

    assert [(rank, box.value) for rank, box in results] == [(r, 7) for r in range(world_size)]


def test_run_ranks_gives_the_variables_of_a_launch() -> None:
    first, second = run_ranks(launch_variables, 2)

    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1")
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["WORLD_SIZE"] == second["LOCAL_WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_can_make_a_process_group(world_size: int) -> None:
    expected = sum(range(world_size + 1))

    assert run_ranks(sum_of_ranks, world_size) == [expected] * world_size


def test_workers_are_kept_for_the_next_job() -> None:
    assert run_ranks(process_id, 2) == run_ranks(process_id, 2)


def test_a_job_leaves_nothing_behind_in_the_worker() -> None:
    before = run_ranks(state, 1)

    run_ranks(disturb, 1)

    assert run_ranks(state, 1) == before
    assert before[0][:3] == (None, False, 1)


def test_the_ranks_of_a_job_share_a_fresh_directory() -> None:
    assert run_ranks(write_and_list, 2) == [["0", "1"]] * 2
    assert run_ranks(write_and_list, 1) == [["0"]]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_first_cause_comes_first_with_its_traceback(failing: int) -> None:
    with pytest.raises(RanksFailed, match="2 of 2 ranks failed") as caught:
        run_ranks(fail_on, 2, failing)

    first, second = caught.value.failures
    assert (first.rank, first.message) == (failing, "ValueError: the first cause")
    assert 'raise ValueError("the first cause")' in first.details
    assert second.rank == 1 - failing
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_job_that_hangs_is_ended_and_says_where_it_was() -> None:
    with pytest.raises(RanksFailed, match="rank 1: still running") as caught:
        run_ranks(hang_on, 2, 1, timeout_seconds=0.5)

    assert [failure.rank for failure in caught.value.failures] == [1]
    assert "in hang_on" in caught.value.failures[0].details


def test_the_pool_heals_after_a_hang_and_keeps_the_other_workers() -> None:
    before = run_ranks(process_id, 2)
    with pytest.raises(RanksFailed):
        run_ranks(hang_on, 2, 1, timeout_seconds=0.5)

    after = run_ranks(process_id, 2)

    assert before[0] in after
    assert before[1] not in after


def test_a_rank_that_dies_is_named_with_its_last_output() -> None:
    with pytest.raises(RanksFailed, match="rank 0: its process ended by SIGKILL") as caught:
        run_ranks(die_on, 2, 0)

    assert "last words" in caught.value.failures[0].details
    assert run_ranks(sum_of_ranks, 2) == [3.0, 3.0]


def test_an_exception_that_cannot_be_pickled_comes_back_as_text() -> None:
    with pytest.raises(RanksFailed, match="Odd: ab"):
        run_ranks(raise_odd, 1)


def test_an_exit_of_the_job_does_not_end_the_worker() -> None:
    before = run_ranks(process_id, 1)

    with pytest.raises(RanksFailed, match="SystemExit: 3"):
        run_ranks(leave, 1)

    assert run_ranks(process_id, 1) == before


def test_a_value_that_cannot_be_pickled_is_a_failure_of_the_rank() -> None:
    with pytest.raises(RanksFailed, match=r"rank 0: .*local object"):
        run_ranks(returns_a_lambda, 1)


def test_a_function_inside_a_test_is_refused() -> None:
    def inner() -> None:
        pass

    with pytest.raises(InvalidArgument, match="defined at the top of a module"):
        run_ranks(inner, 1)


def test_no_rank_at_all_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="world_size=0"):
        run_ranks(process_id, 0)


def test_a_module_that_no_import_finds_is_loaded_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "unfindable.py"
    file.write_text("def answer():\n    return __name__\n")
    spec = __import__("importlib.util").util.spec_from_file_location("far.away.unfindable", file)
    module = __import__("importlib.util").util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "far", module)
    monkeypatch.setitem(sys.modules, "far.away", module)
    monkeypatch.setitem(sys.modules, "far.away.unfindable", module)
    spec.loader.exec_module(module)

    assert run_ranks(module.answer, 1) == ["far.away.unfindable"]


def test_a_closed_pool_leaves_no_process() -> None:
    pool = RankPool()
    (pid,) = pool.run(process_id, 1, (), 60.0)

    pool.close()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_spawned_ranks_can_be_killed_one_by_one(tmp_path: Path) -> None:
    with spawn_ranks(hang_on, 2, 0, directory=tmp_path) as ranks:
        second = ranks.processes[1].wait(60)
        ranks.kill(0)

        assert (second, *ranks.wait()) == (0, -signal.SIGKILL, 0)


def test_spawned_scripts_get_their_words_and_variables(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(os.environ['RANK'], os.environ['TRY'], sys.argv[1])")

    with spawn_ranks(script, 2, "word", directory=tmp_path, environ={"TRY": "it"}) as ranks:
        assert ranks.wait() == (0, 0)

        assert [ranks.output(rank).split() for rank in (0, 1)] == [
            ["0", "it", "word"],
            ["1", "it", "word"],
        ]

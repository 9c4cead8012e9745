"""A checkpoint that is written beside the training holds what was there when it was asked for."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import SGD

from tests.core.forking import forked_ranks
from tests.core.killing import Leg, killed_while_saving, moved, wait_for_save
from tests.core.killing import train as train_leg
from tests.core.saving_beside import (
    STRATEGIES,
    collectives_of_a_save,
    differences,
    held_writes,
    prepare,
    train,
)
from tests.core.small_runs import (
    different,
    fit,
    left_over,
    make_data,
    make_model,
    quiet_trainer,
    saved,
)
from torchweld.callbacks import ModelCheckpoint
from torchweld.checkpoint import Checkpoint, find_damage, last, snapshot
from torchweld.errors import CheckpointError, LoopError, RankFailed, RankMissing
from torchweld.interfaces import Border, Run
from torchweld.loop.beside import BesideSaver
from torchweld.loop.run import TrainingRun
from torchweld.processes.beside import BesideExchange
from torchweld.processes.watching import Watch
from torchweld.testing import run_ranks


@contextmanager
def full_disk(*, here: bool) -> Iterator[None]:
    """Files of this process cannot grow beyond 3 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def asynchronous(**options: Any) -> ModelCheckpoint:
    """Checkpoints after every step, all kept, written beside the next."""
    return ModelCheckpoint(
        **{"every_n_train_steps": 1, "save_top_k": -1, "async_save": True, **options}
    )


def model_of(path: Path) -> dict[str, Tensor]:
    """The tensors of the model in a checkpoint."""
    checkpoint = Checkpoint.open(path)
    names = [name for name in checkpoint.names() if name.startswith("model/")]
    return {name.removeprefix("model/"): checkpoint.tensor(name) for name in names}


def parameters_of(run: TrainingRun) -> dict[str, Tensor]:
    """Copies of the parameters of a run."""
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


# ---- what is saved -------------------------------------------------------------------------------


def _zero_after_saving(root: str) -> tuple[list[str], bool]:
    with held_writes() as gate, prepare(root) as run:
        train(run, 3)
        expected = parameters_of(run)
        future = run.async_save()
        begun = future.done()
        with torch.no_grad():
            for _, parameter in run.model.named_parameters():
                parameter.zero_()
        gate.set()
        return different(expected, model_of(future.result())), begun


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_file_holds_the_weights_of_the_call_though_they_were_zeroed_right_after(
    world_size: int, tmp_path: Path
) -> None:
    assert run_ranks(_zero_after_saving, world_size, str(tmp_path)) == [([], False)] * world_size


def _train_beside_saving(root: str) -> list[str]:
    with held_writes() as gate, prepare(root, max_epochs=4) as run:
        train(run, 2)
        expected = parameters_of(run)
        future = run.async_save()
        train(run, 4)
        assert not future.done()
        assert different(expected, parameters_of(run))
        gate.set()
        return different(expected, model_of(future.result()))


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_run_while_a_checkpoint_is_written(world_size: int, tmp_path: Path) -> None:
    assert run_ranks(_train_beside_saving, world_size, str(tmp_path)) == [[]] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_is_the_same_written_beside_the_steps_or_between_them(
    world_size: int, tmp_path: Path
) -> None:
    results = run_ranks(differences, world_size, str(tmp_path), STRATEGIES[world_size])

    assert results == [[]] * world_size
    assert left_over(tmp_path) == []
    assert len(saved(tmp_path / "beside")) == (6 if world_size == 1 else 4)


# ---- communication -------------------------------------------------------------------------------


def test_a_save_makes_no_collective_on_the_group_of_the_training(tmp_path: Path) -> None:
    assert run_ranks(collectives_of_a_save, 2, str(tmp_path), "ddp") == [(0, 0, 1), (0, 0, 1)]


def _save_in_own_group(root: str, place: str) -> list[str]:
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    dist.init_process_group("gloo", place or None, rank=rank, world_size=world_size)
    with held_writes() as gate, prepare(root) as run:
        train(run, 1)
        expected = parameters_of(run)
        future = run.async_save()
        train(run, 1)
        gate.set()
        return different(expected, model_of(future.result()))


@pytest.mark.parametrize("by", ["environment", "file"])
def test_a_process_group_of_the_users_is_no_obstacle(by: str, tmp_path: Path) -> None:
    place = f"file://{tmp_path}/rendezvous" if by == "file" else ""

    assert run_ranks(_save_in_own_group, 2, str(tmp_path / "runs"), place) == [[], []]


# ---- one at a time -------------------------------------------------------------------------------


def _save_twice(root: str) -> list[bool]:
    with held_writes(0.3), prepare(root) as run:
        train(run, 1)
        first = run.async_save()
        done = [first.done()]
        train(run, 1)
        second = run.async_save()
        done += [first.done(), second.done()]
        train(run, 1)
        run.save()
        return [*done, second.done()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_next_save_waits_for_the_one_in_flight(world_size: int, tmp_path: Path) -> None:
    expected = [False, True, False, True]

    assert run_ranks(_save_twice, world_size, str(tmp_path)) == [expected] * world_size


def _fit_to_the_end(root: str) -> tuple[list[str], str, list[str]]:
    with held_writes(0.2):
        trainer = quiet_trainer(root, callbacks=asynchronous(), max_epochs=1)
        _, result = fit(trainer)
    assert result.checkpoint is not None
    threads = [t.name for t in threading.enumerate() if t.name == "torchweld-save"]
    return [path.name for path in saved(root)], result.checkpoint.name, threads


def test_the_end_of_a_run_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    steps = [f"step-{step}" for step in range(1, 7)]

    assert _fit_to_the_end(str(tmp_path)) == (steps, "step-6", [])


def test_an_older_checkpoint_is_removed_only_when_the_next_is_complete(tmp_path: Path) -> None:
    seen = []
    keep = asynchronous(save_top_k=1, every_n_train_steps=2)
    with held_writes() as gate, prepare(tmp_path, callbacks=[keep], log_every_n_steps=1) as run:
        for step in range(1, 6):
            if step == 4:
                gate.set()
                run.borders.saver.wait()
                gate.clear()
            train(run, 1)
            seen.append([path.name for path in saved(tmp_path)])
        gate.set()

    assert seen == [[], [], [], ["step-2"], ["step-2"]]
    assert [path.name for path in saved(tmp_path)] == ["step-5"]


def test_a_checkpoint_in_flight_is_not_found(tmp_path: Path) -> None:
    with held_writes() as gate, prepare(tmp_path) as run:
        train(run, 1)
        path = run.save()
        train(run, 1)
        run.async_save()

        assert last(tmp_path) == (path, [])
        gate.set()


def _use_the_run(root: str) -> tuple[dict[str, float], dict[str, float], list[str]]:
    with held_writes() as gate, prepare(root) as run:
        train(run, 2)
        before = run.evaluate(make_data())
        future = run.async_save()
        meanwhile = run.evaluate(make_data())
        run.export(Path(root) / "weights.safetensors")
        assert not future.done()
        gate.set()
        exported = load_file(Path(root) / "weights.safetensors")
        wrong = different(exported, model_of(future.result()))
    return dict(before), dict(meanwhile), wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_and_export_go_on_beside_a_save(world_size: int, tmp_path: Path) -> None:
    for before, meanwhile, wrong in run_ranks(_use_the_run, world_size, str(tmp_path)):
        assert before == meanwhile
        assert wrong == []


def test_half_a_gradient_is_not_saved(tmp_path: Path) -> None:
    with prepare(tmp_path, accumulate_grad_batches=2) as run:
        train(run, 1)
        with pytest.raises(LoopError, match="inside an accumulation window"):
            run.async_save()
        train(run, 1)


def test_a_run_that_writes_nothing_says_so(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=(), enable_checkpointing=False)
    run = trainer.prepare(
        make_model(), make_data(), loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1)
    )
    with run:
        train(run, 1)
        with pytest.raises(CheckpointError, match="this run writes nothing"):
            run.async_save()


# ---- failure -------------------------------------------------------------------------------------

NEXT: dict[str, Callable[[TrainingRun], Any]] = {
    "the next border": lambda run: train(run, 2),
    "the end": lambda run: run.close(),
    "save": lambda run: run.save(),
    "async_save": lambda run: run.async_save(),
}


def _fail_beside(root: str, who: int, then: str) -> tuple[int, str]:
    try:
        with prepare(root, log_every_n_steps=1) as run:
            train(run, 1)
            run.save()
            train(run, 1)
            with full_disk(here=run.env.rank == who):
                wait([run.async_save()])
            NEXT[then](run)
    except CheckpointError as error:
        return run.progress.step, str(error)
    return run.progress.step, "no error"


@pytest.mark.parametrize(
    ("world_size", "who", "then"),
    [*((2, 1, then) for then in NEXT), (2, 0, "the next border"), (1, 0, "the next border")],
)
def test_a_full_disk_ends_all_ranks_at_the_next_border_and_the_older_checkpoint_stays(
    world_size: int, who: int, then: str, tmp_path: Path
) -> None:
    outcomes = run_ranks(_fail_beside, world_size, str(tmp_path), who, then)

    for step, message in outcomes:
        assert step == 2
        assert f"step-2 was not written - rank {who}: OSError: [Errno 27] File too" in message
    assert [path.name for path in saved(tmp_path)] == ["step-1"]
    assert last(tmp_path)[0] == saved(tmp_path)[0]
    assert left_over(tmp_path) == []


class RaisingAt:
    """A callback that raises in one step, on one rank."""

    def __init__(self, step: int, rank: int, error: type[BaseException]) -> None:
        self.step, self.rank, self.error = step, rank, error

    def next_due(self, progress: Any) -> int:
        return int(progress.step) + 1

    def at(self, border: Border, run: Run) -> None:
        if border.progress.step == self.step and run.env.rank == self.rank:
            raise self.error("the sample is broken")


def _raise_beside(root: str, who: int, error: type[BaseException]) -> str:
    callbacks = [RaisingAt(3, who, error), asynchronous(every_n_train_steps=2)]
    strategy = STRATEGIES[int(os.environ.get("WORLD_SIZE", "1"))]
    with held_writes(0.5):
        try:
            fit(quiet_trainer(root, callbacks=callbacks, strategy=strategy))
        except BaseException as raised:  # noqa: BLE001 - every rank's is looked at
            return f"{type(raised).__name__}: {raised}"
    return "no error"


@pytest.mark.parametrize(
    ("world_size", "who", "error"),
    [(1, 0, KeyboardInterrupt), (2, 0, KeyboardInterrupt), (2, 1, ValueError)],
)
def test_an_error_on_one_rank_lets_the_save_in_flight_come_to_its_end(
    world_size: int, who: int, error: type[BaseException], tmp_path: Path
) -> None:
    outcomes = run_ranks(_raise_beside, world_size, str(tmp_path), who, error)

    said = f"{error.__name__}: the sample is broken"
    assert outcomes[who] == said
    for other in outcomes[:who] + outcomes[who + 1 :]:
        assert f"RankFailed: rank {who} stopped in step 3: {said}" in other
        assert f"last complete checkpoint: {saved(tmp_path)[0]} (intact)" in other
    assert [path.name for path in saved(tmp_path)] == ["step-2"]
    assert not find_damage(saved(tmp_path)[0])
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_ctrl_c_while_a_save_begins_ends_all_and_leaves_whole_checkpoints(
    world_size: int, tmp_path: Path
) -> None:
    leg = Leg(STRATEGIES[world_size], world_size, until=1000)
    with forked_ranks(train_leg, world_size, leg, 0.2, None, directory=tmp_path) as processes:
        wait_for_save(tmp_path / "runs", processes, 2)
        processes.send(signal.SIGINT)
        codes = processes.codes()

    assert 0 not in codes
    assert None not in codes
    assert any("KeyboardInterrupt" in processes.output(rank) for rank in range(world_size))
    assert last(tmp_path / "runs") == (saved(tmp_path / "runs")[-1], [])


def test_a_save_interrupted_before_its_thread_began_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    draft = snapshot(tmp_path / "step-1", shards=[], header={})
    begun, saver = left_over(tmp_path), BesideSaver()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saver.start(draft, _exchanges(dist.HashStore())[0], print)

    assert saver.wait_after_error() == f"{tmp_path / 'step-1'} was not begun"
    assert (begun, left_over(tmp_path)) == ([".step-1.part"], [])


def _forget_to_close(root: str) -> None:
    run = prepare(root)
    train(run, 2)
    with held_writes(0.5):
        run.async_save()
        time.sleep(0.1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_process_that_ends_without_closing_its_run_writes_what_it_began(
    world_size: int, tmp_path: Path
) -> None:
    with forked_ranks(_forget_to_close, world_size, "runs", directory=tmp_path) as processes:
        assert processes.codes() == [0] * world_size, processes.output(0)

    assert [path.name for path in saved(tmp_path / "runs")] == ["step-2"]
    assert not find_damage(saved(tmp_path / "runs")[0])


def test_ctrl_c_again_does_not_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    futures: list[Future[Path]] = []

    def interrupt_twice() -> None:
        with prepare(tmp_path) as run:
            train(run, 1)
            futures.append(run.async_save())
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
            raise KeyboardInterrupt

    with held_writes() as gate:
        with pytest.raises(KeyboardInterrupt):
            interrupt_twice()
        assert not futures[0].done(), futures[0].exception()
        gate.set()
        wait(futures)

    assert "step-1 was still being written when Ctrl-C came again" in capsys.readouterr().out
    assert futures[0].result() == saved(tmp_path)[0]


# ---- agreement beside the training ---------------------------------------------------------------


def _exchanges(store: dist.Store, watch: Any = None) -> list[BesideExchange]:
    return [
        BesideExchange(
            store, rank=rank, world_size=2, prefix="save/0/1", watch=watch, timeout_seconds=30
        )
        for rank in range(2)
    ]


def test_threads_exchange_texts_in_the_order_of_the_ranks() -> None:
    first, second = _exchanges(dist.HashStore())
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second, "written", "of rank 1")

        assert first("written", "of rank 0") == ["of rank 0", "of rank 1"] == other.result()


def test_a_hurried_thread_waits_no_longer_and_names_who_is_missing() -> None:
    first, _ = _exchanges(dist.HashStore())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first, "written", "")
        first.hurry(0.1)

        with pytest.raises(RankMissing, match=r"rank 1 of 2 did not come to 'written' within 0.1"):
            waiting.result()


def test_a_thread_stops_waiting_when_another_rank_has_stopped() -> None:
    watch = Watch(dist.HashStore(), rank=0, world_size=2, host=0, timeout_seconds=30)
    watch.cause = "rank 1 is gone"

    with pytest.raises(RankFailed, match="rank 1 is gone"):
        _exchanges(dist.HashStore(), watch)[0]("written", "")


# ---- kill -9, and another place ------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 2)])
def test_a_run_killed_while_it_saves_leaves_a_checkpoint_that_resumes_bitwise(
    strategy: str, world_size: int, rounds: int, tmp_path: Path
) -> None:
    assert killed_while_saving(tmp_path, strategy, world_size=world_size, rounds=rounds) == []


@pytest.mark.parametrize("steps", [(3, 8, 12), (6, 7, 12)], ids=["in epochs", "between epochs"])
def test_a_run_goes_on_under_another_strategy_on_another_number_of_processes_and_back(
    steps: tuple[int, int, int], tmp_path: Path
) -> None:
    first, second, third = steps
    legs = [Leg("ddp", 2, first), Leg("single", 1, second), Leg("ddp", 2, third)]

    assert moved(tmp_path, legs) == []

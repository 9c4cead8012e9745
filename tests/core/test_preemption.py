"""A signal that asks a run to end is obeyed at the next border, with a checkpoint, by all ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from tests.core.test_failures import assert_saved_whole, launched
from torchweld import Trainer, use
from torchweld.errors import Preempted
from torchweld.interfaces import Border, Run


@pytest.mark.parametrize("harm", ["terminate", "warn_by_slurm"])
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint_to_go_on_from(
    harm: str, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    with launched(tmp_path / "whole", "none", "die", "0") as whole:
        assert whole.codes() == [0, 0]
    with launched(tmp_path, "forward", harm, "1", SLURM_JOB_ID="7") as ended:
        codes = ended.codes()
        told = ended.output(0)
    found = assert_saved_whole(tmp_path / "runs", "step-5")
    with launched(tmp_path, "none", "die", "0", "last") as resumed:
        resumed.codes()

    assert codes == [75, 75]
    assert f"ended the run after step 5: {found} is complete" in told
    assert resumed.output(0).splitlines()[-1] == whole.output(0).splitlines()[-1]


def test_sigusr1_outside_of_slurm_is_not_torchwelds(tmp_path: Path) -> None:
    with launched(tmp_path, "forward", "warn_by_slurm", "0", world_size=1) as launch:
        assert launch.codes() == [-signal.SIGUSR1]


# ---- in this process -----------------------------------------------------------------------------


class Terminate:
    """A callback that sends SIGTERM, or another signal to all processes, after step 2."""

    def __init__(self, everyone: signal.Signals | None = None) -> None:
        self.everyone = everyone

    def next_due(self, progress: object) -> int:
        return 2

    def at(self, border: Border, run: Run) -> None:
        if border.progress.step == 2 and "fit_end" not in border.kind:
            children = [child.pid for child in multiprocessing.active_children()]
            for process in [*(children if self.everyone else []), os.getpid()]:
                os.kill(process or 0, self.everyone or signal.SIGTERM)


def trainer(root: Path, *, terminate: Terminate | None = None, **flags: object) -> Trainer:
    return Trainer(
        strategy="single",
        data=use("torch", batch_size=4, num_workers=1 if terminate else 0),
        max_epochs=1,
        log_every_n_steps=3,
        callbacks=[terminate or Terminate()],
        default_root_dir=root,
        logger=False,
        **flags,  # type: ignore[arg-type]  # enable_checkpointing alone
    )


SAMPLES = TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
SGD_SLOW = partial(SGD, lr=0.1)


def test_an_own_loop_ends_at_the_next_border_and_says_so_after_it(tmp_path: Path) -> None:
    run = trainer(tmp_path).prepare(nn.Linear(4, 3), SAMPLES, optimizer=SGD_SLOW)
    for inputs, targets in run.batches():
        run.backward(F.cross_entropy(run.model(inputs), targets))
        run.step()

    with pytest.raises(Preempted) as raised:
        run.close()

    assert (raised.value.code, run.progress.step) == (75, 3)
    assert_saved_whole(tmp_path, "step-3")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_workers_of_a_loader_outlive_the_signal_that_slurm_sends_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    previous = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    run = trainer(tmp_path, terminate=Terminate(signal.SIGUSR1))
    try:
        with pytest.raises(Preempted):
            run.fit(nn.Linear(4, 3), SAMPLES, loss=F.cross_entropy, optimizer=SGD_SLOW)
    finally:
        signal.signal(signal.SIGUSR1, previous or signal.SIG_DFL)

    assert_saved_whole(tmp_path, "step-3")


def test_the_exit_code_is_another_where_nothing_was_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, enable_checkpointing=False)

    with pytest.raises(Preempted) as raised:
        run.fit(nn.Linear(4, 3), SAMPLES, loss=F.cross_entropy, optimizer=SGD_SLOW)

    assert raised.value.code == 143


def test_a_handler_of_the_user_stays(tmp_path: Path) -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        trainer(tmp_path).fit(nn.Linear(4, 3), SAMPLES, loss=F.cross_entropy, optimizer=SGD_SLOW)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert came == [signal.SIGTERM]


def test_a_run_in_another_thread_trains_without_handlers(tmp_path: Path) -> None:
    quiet = Trainer(strategy="single", data=use("torch", batch_size=4), barebones=True)
    work = partial(quiet.fit, nn.Linear(4, 3), SAMPLES, loss=F.cross_entropy, optimizer=SGD_SLOW)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(work().progress.step))

    thread.start()
    thread.join(60)

    assert ended == [16]

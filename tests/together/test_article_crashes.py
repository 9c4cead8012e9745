"""The article's stack, killed or interrupted: resumed bitwise, and nothing left behind."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.composer.small_nets import make_sgd
from tests.core.forking import forked_ranks
from tests.core.killing import GLOBAL_BATCH, Leg, killed_while_saving, wait_for_save
from tests.ffcv.writing import shared_memory_of
from tests.together.matrix import FOUR
from tests.together.matrix_choices import STRATEGIES, Cell, Images, make_net
from tests.together.matrix_runs import SEED, chosen
from torchweld import Trainer, use
from torchweld.callbacks import ModelCheckpoint

SOAK = [pytest.param(name, marks=pytest.mark.soak) for name in STRATEGIES if name != "fsdp"]
NUM_SAMPLES = 40  # 5 steps an epoch, so that most checkpoints lie within one
PATIENCE_SECONDS = 240.0


def train(leg: Leg, _dropout: float, ckpt_path: str | None, *, cache: str) -> None:
    """Be one rank of the article's training, in small."""
    torch.set_num_threads(1)
    trainer = Trainer(
        strategy=use(leg.strategy, **leg.options),
        data=use("ffcv", batch_size=GLOBAL_BATCH // leg.world_size, cache_dir=cache),
        surgery=[chosen(name) for name in FOUR],
        default_root_dir="runs",
        callbacks=ModelCheckpoint(every_n_train_steps=2, async_save=True),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        max_steps=leg.until,
        seed=SEED,
    )
    trainer.fit(
        make_net(), Images(NUM_SAMPLES), loss=F.cross_entropy, optimizer=make_sgd,
        ckpt_path=ckpt_path,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the images are converted once."""
    return str(tmp_path_factory.mktemp("beton"))


# ---- kill -9 -------------------------------------------------------------------------------------


def problems_of(directory: Path, strategy: str, cache: str, rounds: int) -> list[str]:
    name, options = STRATEGIES[strategy]
    job = partial(train, cache=cache)
    return killed_while_saving(
        directory, name, options, world_size=Cell(strategy).world_size, rounds=rounds, job=job
    )


@pytest.mark.slow
def test_a_killed_run_resumes_bitwise(cache: str, tmp_path: Path) -> None:
    assert problems_of(tmp_path, "fsdp", cache, rounds=1) == []


@pytest.mark.soak
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ten_runs_killed_at_random_moments_resume_bitwise(
    strategy: str, cache: str, tmp_path: Path
) -> None:
    assert problems_of(tmp_path, strategy, cache, rounds=10) == []


# ---- Ctrl-C --------------------------------------------------------------------------------------


class Traces:
    """What some processes, and those they have started, hold at this moment."""

    def __init__(self, roots: list[int]) -> None:
        self.processes = {pid: _start_of(pid) for pid in _with_children(roots)}
        lines = [line for pid in self.processes for line in shared_memory_of(pid)]
        self.shared = {Path(line.split(maxsplit=5)[5]) for line in lines}

    def left(self) -> list[str]:
        """What of it is still there."""
        alive = [f"process {p}" for p, start in self.processes.items() if _start_of(p) == start]
        named = {path for path in self.shared if path.exists()}
        # Named by torch after the process, whether it was mapped at that moment or not.
        named |= {path for p in self.processes for path in Path("/dev/shm").glob(f"torch_{p}_*")}
        return alive + [str(path) for path in sorted(named)]

    def left_in_the_end(self, seconds: float = 30.0) -> list[str]:
        """What is still there after some time: a child ends a little after its parent."""
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.left()


def _stat_of(pid: int) -> list[str]:
    """State, parent, … of a process; empty for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _start_of(pid: int) -> str:
    """When it was started, which tells it from a later process of its number."""
    fields = _stat_of(pid)
    return fields[19] if fields else ""


def _with_children(roots: list[int]) -> list[int]:
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    parents = {pid: int(stat[1]) for pid in numbers if (stat := _stat_of(pid))}
    found = list(roots)
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", *SOAK])
def test_ctrl_c_leaves_no_process_and_no_shared_memory(
    strategy: str, cache: str, tmp_path: Path
) -> None:
    name, options = STRATEGIES[strategy]
    leg = Leg(name, Cell(strategy).world_size, 10_000, options)
    job = partial(train, cache=cache)
    with forked_ranks(job, leg.world_size, leg, 0.0, None, directory=tmp_path) as processes:
        wait_for_save(tmp_path / "runs", processes, 1)
        traces = Traces([process.pid for process in processes.processes if process.pid])
        processes.send(signal.SIGINT)
        codes = processes.codes(PATIENCE_SECONDS)
        left = traces.left_in_the_end()

    assert None not in codes
    assert 0 not in codes
    assert "KeyboardInterrupt" in processes.output(0)
    assert left == []


def untidy(ready: str) -> None:
    """A rank that starts a process and makes shared memory, and ends without a thought."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    path = Path(f"/dev/shm/torchweld-untidy-{os.getpid()}")
    path.write_bytes(b"0" * mmap.PAGESIZE)
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    Path(ready).write_text(f"{child.pid} {path} {len(memory)}")
    while True:
        time.sleep(0.1)


def test_what_is_left_by_an_untidy_rank_is_found(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with forked_ranks(untidy, 1, str(ready), directory=tmp_path) as processes:
        wait_until(lambda: ready.exists() and bool(ready.read_text()))
        child, path, _ = ready.read_text().split()
        traces = Traces([process.pid for process in processes.processes if process.pid])
        processes.send(signal.SIGINT)
        codes = processes.codes(PATIENCE_SECONDS)
        left = traces.left()
        os.kill(int(child), signal.SIGKILL)
        Path(path).unlink()

    assert codes == [1]
    assert left == [f"process {child}", path]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)

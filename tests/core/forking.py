"""Processes for tests that end some of them: forked from one that has imported what takes long.

Unlike ``spawn_ranks`` this costs milliseconds a process; unlike ``run_ranks`` nobody looks after
them: they are ended by the run alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torchweld.testing.rank_processes import free_port, rank_environ, store_environ

FORKS = multiprocessing.get_context("forkserver")
# Optimizers import torch._dynamo, which takes 2 s. Not composer, which takes over Ctrl-C.
FORKS.set_forkserver_preload(["torch._dynamo", "torchweld.trainer", "torchweld.strategies.ddp"])


class Forks:
    """Running processes by rank; output goes to ``rank-<n>.txt``."""

    def __init__(self, directory: Path, processes: list[BaseProcess]) -> None:
        self.directory, self.processes = directory, processes

    def codes(self, seconds: float = 240.0) -> list[int | None]:
        """Exit codes once all have ended; None for one that still runs after ``seconds``."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        """What a rank has printed."""
        return (self.directory / f"rank-{rank}.txt").read_text()

    def kill(self, rank: int) -> None:
        """Do to one rank what ``kill -9`` does."""
        self.processes[rank].kill()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all, as a terminal does."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)


@contextmanager
def forked_ranks(
    target: Callable[..., Any],
    world_size: int,
    *args: Any,
    directory: Path,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Forks]:
    """Processes that call ``target(*args)``; none is left afterwards."""
    everyone = {**store_environ(free_port()), **(environ or {})}
    processes: list[BaseProcess] = [
        FORKS.Process(
            target=_be_rank,
            args=({**everyone, **rank_environ(rank, world_size)}, str(directory), target, args),
        )
        for rank in range(world_size)
    ]
    forks = Forks(directory, processes)
    try:
        for process in processes:
            process.start()
        yield forks
    finally:
        forks.send(signal.SIGKILL)
        forks.codes()


def _be_rank(
    environ: dict[str, str], directory: str, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(environ)
    os.chdir(directory)
    output = os.open(f"rank-{environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    # Started in the background of a shell, a process ignores Ctrl-C from its beginning.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*args)

"""Several ranks on this machine, for tests: a warm pool of workers, or fresh processes to kill.

``run_ranks(function, 2, ...)`` costs milliseconds after the first call, because the workers keep
torch imported. ``spawn_ranks`` starts processes of its own, for tests that end one of them.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from torchweld.errors import InvalidArgument
from torchweld.testing.rank_processes import (
    free_port,
    hosted_store,
    kill,
    make_job,
    python_command,
    rank_environ,
    start,
    store_environ,
)
from torchweld.testing.rank_worker import Failure, Job

START_SECONDS = 120.0
"""How long a worker may take to import torch; it takes 2-3 s, more on a busy machine."""

GRACE_SECONDS = 5.0
"""How long the other ranks may go on after one failed, before they are ended."""

LEAVE_SECONDS = 2.0
"""How long a worker may take to clean up after a job, before it is replaced."""


class RanksFailed(AssertionError):
    """A job failed on some ranks; an assertion error, as the job is the body of a test.

    Attributes:
        failures: one for each rank that did not return, the first cause first.
    """

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 60.0
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes and return the results by rank.

    Every process has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this job, one
    thread, and a directory that the ranks of this job share. No process group is made; one that
    the function makes is destroyed afterwards.

    Args:
        function: a module-level function; its module may be a test module.
        world_size: how many processes, > 0.
        args: what to call it with, picklable.
        timeout_seconds: ranks that still run then are ended and named.

    Raises:
        RanksFailed: with every rank that failed, hung or died, the first cause first.
        InvalidArgument: the function or an argument cannot be sent to another process.
    """
    return _shared_pool().run(function, world_size, args, timeout_seconds)


def spawn_ranks(
    target: str | Path | Callable[..., Any],
    world_size: int,
    *args: Any,
    directory: str | Path,
    environ: Mapping[str, str] | None = None,
) -> SpawnedRanks:
    """Start fresh processes, one a rank, for a test that kills one of them.

    Args:
        target: a script, called with ``args`` as words, or a module-level function.
        world_size: how many processes, > 0.
        args: what the script or the function gets.
        directory: their working directory; their output is written there too.
        environ: variables on top of this process's own.
    """
    place = Path(directory)
    port = free_port()
    processes, outputs = [], []
    for rank in range(world_size):
        ours = {**rank_environ(rank, world_size), **store_environ(port)}
        outputs.append(place / f"rank-{rank}-{port}.txt")
        if callable(target):
            job_file = place / f"rank-{rank}-{port}.job"
            job_file.write_bytes(pickle.dumps(make_job(target, args, ours, str(place))))
            command = [*python_command("run_once(sys.argv[2])"), str(job_file)]
        else:
            command = [sys.executable, str(target), *map(str, args)]
        processes.append(start(command, outputs[-1], {**(environ or {}), **ours}, cwd=place))
    return SpawnedRanks(tuple(processes), tuple(outputs))


@dataclass(frozen=True)
class SpawnedRanks:
    """Running processes by rank; leaving the context ends those that still run.

    Attributes:
        processes: their handles.
        outputs: files with standard output and error of each.
    """

    processes: tuple[subprocess.Popen[bytes], ...]
    outputs: tuple[Path, ...]

    def wait(self, timeout_seconds: float = 60.0) -> tuple[int, ...]:
        """Return the exit codes once all have ended; ``subprocess.TimeoutExpired`` otherwise."""
        deadline = time.monotonic() + timeout_seconds
        remaining = (max(0.0, deadline - time.monotonic()) for _ in self.processes)
        return tuple(p.wait(left) for p, left in zip(self.processes, remaining, strict=True))

    def kill(self, rank: int) -> None:
        """End one rank as ``kill -9`` does, with the processes that it started."""
        kill(self.processes[rank])

    def output(self, rank: int) -> str:
        """What the rank has printed so far, errors included."""
        return self.outputs[rank].read_text(errors="replace")

    def __enter__(self) -> SpawnedRanks:  # noqa: PYI034 - Self is in typing from 3.11 on
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            kill(process)


class RankPool:
    """Worker processes that run the ranks of one job after another.

    A worker that died or had to be ended is replaced at the next job. After a job the ranks leave
    their process group one by one: with all at once, gloo gets stuck more often.
    """

    def __init__(self) -> None:
        self._home = tempfile.mkdtemp(prefix="torchweld-ranks-")
        self._workers: list[_Worker] = []

    def run(
        self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        """See :func:`run_ranks`."""
        if world_size < 1:
            raise InvalidArgument(f"world_size={world_size}: a job needs at least one rank; give 1")
        with self._directory() as directory, hosted_store() as environ:
            jobs = [
                make_job(function, args, {**environ, **rank_environ(rank, world_size)}, directory)
                for rank in range(world_size)
            ]
            answers = self._answers(jobs, timeout)
        failures = sorted((a for a in answers if isinstance(a, Failure)), key=lambda f: f.when)
        if failures:
            raise RanksFailed(_report(function, answers, failures), failures) from failures[0].error
        return answers

    def close(self) -> None:
        """End all workers; the next job would start new ones."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end()
        self._workers = []
        shutil.rmtree(self._home, ignore_errors=True)

    def _answers(self, jobs: Sequence[Job], timeout: float) -> list[Any]:
        workers = self._take(len(jobs))
        answers: dict[_Worker, Any] = {}
        try:
            for worker, job in zip(workers, jobs, strict=True):
                worker.start(job)
            _collect(workers, answers, timeout)
        finally:
            for rank, worker in enumerate(workers):
                if worker not in answers:
                    answers[worker] = worker.stop(rank, timeout, bool(answers))
            for worker in reversed(workers):
                worker.leave()
            self._workers = [w for w in self._workers if w.process.poll() is None]
        return [answers[worker] for worker in workers]

    def _take(self, world_size: int) -> list[_Worker]:
        Path(self._home).mkdir(exist_ok=True)
        self._workers = [w for w in self._workers if w.process.poll() is None]
        new = [_Worker(self._home) for _ in range(world_size - len(self._workers))]
        for worker in new:
            worker.wait_until_ready()
        self._workers += new
        return self._workers[:world_size]

    @contextmanager
    def _directory(self) -> Iterator[str]:
        path = tempfile.mkdtemp(prefix="torchweld-job-")
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


class _Worker:
    """One process of the pool, seen from the tests."""

    def __init__(self, home: str) -> None:
        self.connection, theirs = Pipe()
        handle, log = tempfile.mkstemp(dir=home, suffix=".txt")
        os.close(handle)
        self.log = Path(log)
        self._offset = 0
        command = [*python_command("serve(int(sys.argv[2]))"), str(theirs.fileno())]
        descriptors = (theirs.fileno(),)
        self.process = start(command, self.log, pass_fds=descriptors, stdin=subprocess.PIPE)
        theirs.close()

    def wait_until_ready(self) -> None:
        if not (self.connection.poll(START_SECONDS) and self._receive() == b"ready"):
            self.end()
            raise RanksFailed(f"a worker process did not start:\n{self.output()}")

    def start(self, job: Job) -> None:
        self._offset = self.log.stat().st_size
        self.connection.send_bytes(pickle.dumps(job))

    def answer(self, rank: int) -> Any:
        """The value or failure that this worker sent, or what became of it."""
        sent = self._receive()
        if sent is not None:
            return pickle.loads(sent)
        code = self.process.wait()
        return Failure(rank, _exit_text(code), self.output(), None, time.monotonic())

    def leave(self) -> None:
        """Let the worker clean up after its job; end it if it cannot."""
        if not (
            self._reaches(b"leave") and self.connection.poll(LEAVE_SECONDS) and self._receive()
        ):
            self.end()

    def stop(self, rank: int, timeout: float, others_answered: bool) -> Failure:
        """End a worker that has not answered, and say where it was."""
        self.process.send_signal(signal.SIGUSR1)  # faulthandler writes all stacks to the log
        try:
            self.process.wait(0.3)
        except subprocess.TimeoutExpired:
            self.end()
        waited = f"still running when it was ended, at most {timeout:g} s after the start"
        hint = "; it may wait for a rank that had ended" if others_answered else ""
        return Failure(rank, waited + hint, self.output(), None, time.monotonic())

    def end(self) -> None:
        kill(self.process)
        self.connection.close()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def output(self) -> str:
        """The last output of the current job."""
        return self.log.read_bytes()[self._offset :].decode(errors="replace")[-6000:]

    def _reaches(self, word: bytes) -> bool:
        try:
            self.connection.send_bytes(word)
        except OSError:  # closed here, or the process has ended
            return False
        return True

    def _receive(self) -> bytes | None:
        try:
            return self.connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return None


@functools.cache
def _shared_pool() -> RankPool:
    pool = RankPool()
    atexit.register(pool.close)
    return pool


def _collect(workers: Sequence[_Worker], answers: dict[_Worker, Any], timeout: float) -> None:
    """Fill ``answers`` until all are there, the time is over, or a failure's grace is over."""
    ranks: dict[Connection, int] = {w.connection: rank for rank, w in enumerate(workers)}
    deadline = time.monotonic() + timeout
    while ranks:
        ready = wait(list(ranks), max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = ranks.pop(connection)
            answer = workers[rank].answer(rank)
            answers[workers[rank]] = answer
            if isinstance(answer, Failure):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _report(function: Callable[..., Any], answers: Sequence[Any], failures: list[Failure]) -> str:
    name = getattr(function, "__qualname__", repr(function))
    lines = [f"{name}: {len(failures)} of {len(answers)} ranks failed; the first cause first"]
    lines += [f"rank {failure.rank}: {failure.message}" for failure in failures]
    lines += [f"--- rank {f.rank}\n{f.details.rstrip()}" for f in failures if f.details]
    return "\n".join(lines)


def _exit_text(code: int) -> str:
    return f"its process ended by {_signal(-code)}" if code < 0 else f"its process exited ({code})"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

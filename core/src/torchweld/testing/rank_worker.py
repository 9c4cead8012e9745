"""The process behind one rank: it imports torch once, then runs one job after another.

Started by :mod:`torchweld.testing.processes`, never imported by a test.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from torchweld.processes import ranks

_SETTLE_SECONDS = 0.005  # for gloo's threads to let go of the last tensors


@dataclass(frozen=True)
class Job:
    """One call on one rank, as it travels to the worker.

    Attributes:
        call: pickled ``(function, args)``; only readable once ``modules`` are loaded.
        modules: name to file of every module that ``call`` refers to.
        path: ``sys.path`` of the process that asked.
        environ: variables of this rank, on top of the worker's own.
        directory: working directory, shared by the ranks of a job.
    """

    call: bytes
    modules: Mapping[str, str]
    path: tuple[str, ...]
    environ: Mapping[str, str]
    directory: str


@dataclass(frozen=True)
class Failure:
    """Why one rank did not return a value.

    Attributes:
        rank: which one.
        message: type and text of the exception, or what happened to the process.
        details: traceback, or the stacks and the last output of a process that was ended.
        error: the exception itself where it can be pickled.
        when: monotonic clock, comparable between the processes of one machine.
    """

    rank: int
    message: str
    details: str = ""
    error: BaseException | None = None
    when: float = 0.0


def serve(descriptor: int) -> None:
    """Run jobs from the connection until the other side closes it."""
    connection = Connection(descriptor)
    _end_with_parent()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    gc.freeze()  # collecting after a job then looks at the job's objects only
    connection.send_bytes(b"ready")
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
            with _restored_state():
                connection.send_bytes(_answer(job))
                connection.recv_bytes()  # the word to leave; see RankPool on the order
        except EOFError:
            return
        connection.send_bytes(b"ready")


def run_once(job_file: str) -> None:
    """Run one pickled job in this process, exceptions and exit codes left as they come."""
    job: Job = pickle.loads(Path(job_file).read_bytes())
    torch.set_num_threads(1)
    _call(job)


def load_module(name: str, file: str) -> ModuleType:
    """Return module ``name`` as it is in ``file``, importable by that name or not.

    pytest's ``--import-mode=importlib`` gives test modules names that no ``import`` finds.
    """
    found = sys.modules.get(name)
    if found is None and _finds(name):
        found = importlib.import_module(name)
    if found is not None and os.path.realpath(found.__file__ or "") == os.path.realpath(file):
        return found
    return _load_file(name, file)


def _finds(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _load_file(name: str, file: str) -> ModuleType:
    parts = name.split(".")
    for end in range(1, len(parts)):
        ancestor = ".".join(parts[:end])
        if ancestor not in sys.modules and not _finds(ancestor):
            sys.modules[ancestor] = ModuleType(ancestor)
            sys.modules[ancestor].__path__ = []
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"module {name!r} cannot be loaded from {file!r}; is it a Python file?")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _end_with_parent() -> None:
    # A hanging job would outlive a killed test run: standard input is a pipe that the parent holds.
    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: its lock would be taken for ever in a forked process
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def _answer(job: Job) -> bytes:
    try:
        answer = pickle.dumps(_call(job))
    except BaseException as error:  # noqa: BLE001 - a stranger's code; every end is reported
        answer = _pickled_failure(int(job.environ["RANK"]), error)
        _leave_process_group()  # at once: the other ranks then stop waiting for this one
        return answer
    _meet()
    return answer


def _meet() -> None:
    # A group that is destroyed while its connections are still being made hangs more often.
    if torch.distributed.is_initialized():
        with suppress(RuntimeError):  # another rank has failed, and is reported
            torch.distributed.barrier()


def _leave_process_group() -> None:
    """Destroy the groups of this job.

    gloo of torch 2.7 can wait for ever in it, the interpreter locked: when its threads still free
    the tensors of the last collective (for that they need the interpreter), and, rarer, for a
    wake-up that ``Loop::unregisterDescriptor`` lost. The pool then replaces this process.
    """
    if torch.distributed.is_initialized():
        time.sleep(_SETTLE_SECONDS)
        ranks._launched.clear()  # it keeps the group of this job alive until the next launch
        torch.distributed.destroy_process_group()
        gc.collect()  # models that refer to a group are in cycles


def _call(job: Job) -> Any:
    os.environ.update(job.environ)
    os.chdir(job.directory)
    sys.path[:] = job.path
    for name, file in job.modules.items():
        load_module(name, file)
    function, args = pickle.loads(job.call)
    return function(*args)


def _pickled_failure(rank: int, error: BaseException) -> bytes:
    message = "".join(traceback.format_exception_only(error)).strip()
    details = "".join(traceback.format_exception(error))
    when = time.monotonic()
    try:
        whole = pickle.dumps(Failure(rank, message, details, error, when))
        pickle.loads(whole)  # some exceptions pickle, and then cannot be made again
    except BaseException:  # noqa: BLE001 - a stranger's exception class, while it is pickled
        return pickle.dumps(Failure(rank, message, details, None, when))
    return whole


@contextmanager
def _restored_state() -> Iterator[None]:
    environ, directory, path = dict(os.environ), Path.cwd(), list(sys.path)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        _leave_process_group()
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(directory)
        sys.path[:] = path
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(1)

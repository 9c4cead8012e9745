"""What tests and benchmarks write is gone afterwards, also when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.scratch import scratch

WORKING = """
import sys, tempfile
from benchmarks.scratch import scratch, terminable

with terminable(), scratch():
    handle, path = tempfile.mkstemp()  # as a library does that knows nothing of this
    print(path, flush=True)
    sys.stdin.read()
"""


@contextmanager
def working(root: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process in a scratch directory, and a file that it wrote."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKING],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory of this test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_temporary_files_of_a_run_go_with_it(root: Path) -> None:
    with scratch() as place:
        path = Path(tempfile.mkdtemp())
        assert path.parent == place

    assert not list(root.iterdir())
    assert tempfile.gettempdir() == str(root)


def test_a_run_that_is_asked_to_end_leaves_nothing(root: Path) -> None:
    with working(root) as (process, path):
        assert path.exists()
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM

    assert not list(root.iterdir())


def test_what_a_killed_run_left_goes_with_the_next_and_no_other(root: Path) -> None:
    with working(root) as (dead, left), working(root) as (_, used):
        dead.kill()
        dead.wait(60)
        assert left.exists()  # nobody could put it away

        with scratch():
            assert not left.parent.exists()
            assert used.exists()


def test_a_forked_process_that_drops_it_leaves_it_alone(root: Path) -> None:
    with scratch() as place:
        leave = scratch()
        other = leave.__enter__()
        child = os.fork()
        if child == 0:
            leave.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

        assert other.exists()
        leave.__exit__(None, None, None)
        assert not other.exists()
        assert place.exists()
    assert not list(root.iterdir())

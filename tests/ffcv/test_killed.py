"""What is left when a conversion is ended from outside: nothing new, and the older file."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.ffcv.writing import (
    leftovers,
    pairs,
    processes_with,
    shared_memory_of,
    start_script,
    wait_until,
)
from torchweld_ffcv import convert
from torchweld_ffcv.beton import read_beton

SLOW = """
import sys, time
from tests.ffcv.writing import picture
from torchweld_ffcv import convert
class Slow:
    def __len__(self):
        return 5000
    def __getitem__(self, index):
        time.sleep(0.01)
        return picture(index % 7, 200, 200), index
print("started", flush=True)
convert(Slow(), sys.argv[1], workers=2)
"""
NAMED = "import os\ndel os.O_TMPFILE\n" + SLOW  # a system that knows no files without a name
STREAM = SLOW.replace("convert(Slow(), ", "convert((Slow()[i] for i in range(5000)), ")


class Killed:
    """A conversion of a slow dataset, in a process group of its own, that is under way."""

    def __init__(self, path: Path, script: str = SLOW) -> None:
        self.word = secrets.token_hex(8)
        self.path = path
        self.process: subprocess.Popen[str] = start_script(script, str(path), self.word)
        wait_until(lambda: len(processes_with(self.word)) == 3, 120)  # itself and two workers

    def left(self) -> list[int]:
        return processes_with(self.word)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A good file from before."""
    convert(pairs(5), tmp_path / "out.beton")
    return tmp_path / "out.beton"


@pytest.mark.parametrize("script", [SLOW, STREAM, NAMED], ids=["dataset", "iterable", "named"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_conversion_leaves_no_process_no_file_no_memory(
    place: Path, number: signal.Signals, script: str
) -> None:
    before, killed = place.read_bytes(), Killed(place, script)
    shared = [line for process in killed.left() for line in shared_memory_of(process)]

    killed.process.send_signal(number)
    killed.process.communicate(timeout=240)

    wait_until(lambda: not killed.left())
    assert killed.process.returncode != 0
    assert place.read_bytes() == before
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert shared == []


def test_ctrl_c_of_a_terminal_reaches_all_and_is_one_traceback(place: Path) -> None:
    killed = Killed(place)

    os.killpg(killed.process.pid, signal.SIGINT)
    _, errors = killed.process.communicate(timeout=240)

    wait_until(lambda: not killed.left())
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert read_beton(place).num_samples == 5


def test_file_of_a_wholly_killed_conversion_never_had_a_name(place: Path) -> None:
    killed = Killed(place)

    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.communicate(timeout=240)

    wait_until(lambda: not killed.left())
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_file_of_a_wholly_killed_conversion_is_removed_by_the_next(place: Path) -> None:
    killed = Killed(place, NAMED)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.communicate(timeout=240)
    wait_until(lambda: not killed.left())
    assert len(leftovers(place.parent)) == 1

    convert(pairs(8), place)

    assert leftovers(place.parent) == []
    assert read_beton(place).num_samples == 8


def test_file_of_a_conversion_that_still_runs_is_left_alone(place: Path) -> None:
    running = Killed(place, NAMED)

    convert(pairs(8), place)

    assert len(leftovers(place.parent)) == 1
    running.process.kill()
    running.process.communicate(timeout=240)
    wait_until(lambda: not running.left())


def test_killed_worker_ends_the_conversion(place: Path) -> None:
    killed = Killed(place)
    worker = next(pid for pid in killed.left() if pid != killed.process.pid)

    os.kill(worker, signal.SIGKILL)
    _, errors = killed.process.communicate(timeout=240)

    assert "a worker process was ended by SIGKILL at samples" in errors
    assert "the older file is as it was" in errors
    assert not killed.left()
    assert leftovers(place.parent) == []


@pytest.mark.soak
def test_conversion_killed_at_any_moment_leaves_nothing(place: Path) -> None:
    chance, before = random.Random(), place.read_bytes()

    for _ in range(100):
        number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        word = secrets.token_hex(8)
        process = start_script(chance.choice([SLOW, STREAM]), str(place), word)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.random() * chance.choice([0.1, 1.5]))
        process.send_signal(number)

        process.communicate(timeout=240)
        wait_until(lambda word=word: not processes_with(word))

        assert [path.name for path in place.parent.iterdir()] == [place.name], number
        assert place.read_bytes() == before, number

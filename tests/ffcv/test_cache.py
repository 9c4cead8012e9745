from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.ffcv.writing import (
    leftovers,
    pairs,
    photo_folder,
    picture,
    start_script,
    wait_until,
)
from torchweld.errors import InvalidArgument
from torchweld.testing.processes import run_ranks
from torchweld_ffcv.beton import read_beton, verify
from torchweld_ffcv.cache import cached_beton
from torchweld_ffcv.errors import ConversionError
from torchweld_ffcv.fingerprint import fingerprint
from torchweld_ffcv.kinds import Image, Int
from torchweld_ffcv.sources import as_source


class Numbers(Dataset[Any]):
    """Counts how often it is read, in a folder, over all processes."""

    def __init__(self, counts: Path, change: Any = None, *, gated: bool = False) -> None:
        self.counts, self.change, self.gated = counts, change, gated

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        if index == 37:
            (self.counts / f"read-{time.monotonic_ns()}").touch()
            wait_until(lambda: not self.gated or (self.counts / "go").exists(), 120)
        return picture(index), self.change(index) if self.change else index


class Broken(Numbers):
    """Fails late; gated, when two processes are there."""

    def __getitem__(self, index: int) -> Any:
        if index == 50:
            (self.counts / f"read-{time.monotonic_ns()}").touch()
            wait_until(lambda: not self.gated or len(list(self.counts.glob("here-*"))) == 2, 120)
            time.sleep(1.0 if self.gated else 0.0)  # the other one then waits for the lock
            raise OSError("the disk is on fire")
        return picture(index), index


def plus(number: int, index: int) -> int:
    return number + index


def reads(counts: Path) -> int:
    return len(list(counts.glob("read-*")))


def mark(given: Any, fields: Any = None) -> str:
    return fingerprint(as_source(given), fields)


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    (tmp_path / "counts").mkdir()
    return tmp_path / "counts"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "ffcv"


# ---- found again -------------------------------------------------------------------------------


def test_dataset_is_converted_once(
    counts: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = cached_beton(Numbers(counts), cache_dir=cache)
    again = cached_beton(Numbers(counts), cache_dir=cache)

    said = capfd.readouterr().err
    assert first == again
    assert reads(counts) == 1
    assert f"converting 60 samples of the Numbers to {first}, once" in said
    assert f"using {first} (fingerprint matches)" in said
    verify(read_beton(first))
    assert read_beton(first).fingerprint == mark(Numbers(counts))


def test_dataloader_and_its_dataset_are_one(counts: Path, cache: Path) -> None:
    dataset = Numbers(counts)

    first = cached_beton(dataset, cache_dir=cache)

    assert cached_beton(DataLoader(dataset, 7), cache_dir=cache) == first


def test_folder_of_a_cache_follows_the_environment(
    counts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))

    assert cached_beton(Numbers(counts)).parent == tmp_path / "mine" / "torchweld" / "ffcv"


def test_damaged_file_is_written_again(
    counts: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = cached_beton(Numbers(counts), cache_dir=cache)
    os.truncate(path, 9_000_000)

    cached_beton(Numbers(counts), cache_dir=cache)

    verify(read_beton(path))
    assert "converting again" in capfd.readouterr().err


def test_barrier_is_passed_after_the_file_is_there(counts: Path, cache: Path) -> None:
    seen: list[list[Path]] = []

    path = cached_beton(
        Numbers(counts), cache_dir=cache, barrier=lambda: seen.append(list(cache.glob("*.beton")))
    )

    assert seen == [[path]]


# ---- what makes a difference -------------------------------------------------------------------


def test_fingerprint_knows_changed_files(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    before = mark(folder)

    (folder / "cat" / "002.jpg").write_bytes((folder / "cat" / "004.jpg").read_bytes())
    changed = mark(folder)
    (folder / "cat" / "004.jpg").rename(folder / "dog" / "004.jpg")

    assert len({before, changed, mark(folder)}) == 3


CHANGES: list[tuple[Callable[[Path], Any], Callable[[Path], Any]]] = [
    (lambda _: pairs(10), lambda _: pairs(11)),
    (lambda _: pairs(40), lambda _: [*pairs(39), (picture(1), 39)]),
    (lambda _: TensorDataset(torch.ones(9)), lambda _: TensorDataset(torch.ones(9).double())),
    (
        lambda counts: Numbers(counts, functools.partial(plus, 1)),
        lambda counts: Numbers(counts, functools.partial(plus, 2)),
    ),
    (
        lambda counts: Numbers(counts, lambda index: index % 10),
        lambda counts: Numbers(counts, lambda index: index % 11),
    ),
]


@pytest.mark.parametrize(("one", "other"), CHANGES)
def test_fingerprint_knows_other_data_and_other_functions(
    counts: Path, one: Callable[[Path], Any], other: Callable[[Path], Any]
) -> None:
    assert mark(one(counts)) == mark(one(counts))
    assert mark(one(counts)) != mark(other(counts))


def test_fingerprint_knows_how_fields_are_stored() -> None:
    ways = [None, {"image": Image()}, {"image": Image(quality=80)}, {"image": Int()}]

    assert len({mark(pairs(3), way) for way in ways}) == 4


def test_fingerprint_uses_a_datasets_own() -> None:
    class Hugging(list[Any]):
        _fingerprint = "abc"

    changed = Hugging(pairs(3))
    changed._fingerprint = "abd"

    assert mark(Hugging(pairs(3))) == mark(Hugging(pairs(3)))
    assert mark(Hugging(pairs(3))) != mark(changed)


def test_fingerprint_is_the_same_in_every_process(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 4)
    script = """
import sys, torch
from torch.utils.data import TensorDataset
from torchweld_ffcv.fingerprint import fingerprint
from torchweld_ffcv.sources import as_source
class Data(list):
    pass
data = Data([(torch.arange(6), "x")])
data.words, data.function = {"a", "b", "c", "d"}, lambda x: x + 1
data.loop = data
for given in (data, sys.argv[1], TensorDataset(torch.arange(30.0))):
    print(fingerprint(as_source(given), None))
"""
    outputs = []
    for seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        words = [sys.executable, "-c", script, str(folder)]
        done = subprocess.run(words, env=environ, check=True, capture_output=True, text=True)
        outputs.append(done.stdout)

    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].split())) == 3


def test_fingerprint_leaves_the_random_state_alone(cache: Path) -> None:
    class Drawing(Dataset[Any]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            return np.float32(index + 0 * random.random())

    random.seed(5)
    cached_beton(Drawing(), cache_dir=cache)
    drawn = random.random()

    random.seed(5)
    assert drawn == random.random()


def test_generator_is_refused_as_it_could_not_be_recognised(cache: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"can be read once only.*torchweld_ffcv\.convert"):
        cached_beton(iter(pairs(3)), cache_dir=cache)


# ---- several processes -------------------------------------------------------------------------


def convert_together(counts: str, cache: str) -> str:
    """The job of one rank."""
    dataset = Numbers(Path(counts))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return str(cached_beton(dataset, rank=rank, world_size=world, cache_dir=cache))


def fail_together(counts: str, cache: str) -> str:
    """The job of one rank, with a dataset that fails."""
    dataset = Broken(Path(counts), gated=True)
    (Path(counts) / f"here-{os.getpid()}").touch()
    try:
        return str(cached_beton(dataset, cache_dir=cache))
    except ConversionError as error:
        return f"failed: {error}"


def test_two_ranks_that_start_together_convert_once(counts: Path, cache: Path) -> None:
    paths = run_ranks(convert_together, 2, str(counts), str(cache), timeout_seconds=120)

    assert len(set(paths)) == 1
    assert reads(counts) == 1
    assert [path.name for path in cache.glob("*.beton")] == [Path(paths[0]).name]
    assert leftovers(cache) == []
    verify(read_beton(paths[0]))


def test_two_ranks_fail_with_one_error_of_one_attempt(counts: Path, cache: Path) -> None:
    said = run_ranks(fail_together, 2, str(counts), str(cache), timeout_seconds=120)

    assert all("sample 50 of 60 could not be written" in text for text in said)
    assert all("the disk is on fire" in text for text in said)
    assert reads(counts) == 1
    assert list(cache.glob("*.beton")) == []


def test_dataset_is_tried_again_after_a_failure(counts: Path, cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConversionError, match="the disk is on fire"):
            cached_beton(Broken(counts), cache_dir=cache)

    assert reads(counts) == 2


def test_rank_that_is_killed_leaves_the_work_to_the_next(counts: Path, cache: Path) -> None:
    script = """
import sys
from pathlib import Path
from tests.ffcv.test_cache import Numbers
from torchweld_ffcv.cache import cached_beton
cached_beton(Numbers(Path(sys.argv[1]), gated=True), cache_dir=sys.argv[2])
"""
    first = start_script(script, str(counts), str(cache))
    wait_until(lambda: list(cache.glob("*.lock")), 120)
    second = start_script(script, str(counts), str(cache))
    waiting = second.stderr
    assert waiting is not None
    line = waiting.readline()

    first.send_signal(signal.SIGKILL)
    (counts / "go").touch()
    first.communicate(timeout=240)
    _, said = second.communicate(timeout=240)

    assert "waiting for another process that converts to" in line
    assert "converted 60 samples" in said
    assert second.returncode == 0
    assert leftovers(cache) == []


def test_cache_that_cannot_be_made_is_one_error() -> None:
    with pytest.raises(ConversionError, match=r"/proc/nowhere.*cache_dir="):
        cached_beton(pairs(3), cache_dir="/proc/nowhere")

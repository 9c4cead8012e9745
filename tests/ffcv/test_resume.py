"""Pixels that depend on seed, epoch and sample alone, and epochs taken up in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ffcv.reading import ROOT, digest, labels, load, photos, write
from torchweld.errors import CheckpointError
from torchweld_ffcv import image
from torchweld_ffcv.beton import read_beton
from torchweld_ffcv.randomness import sample_key, uniform

SPEC = {"image": image(crop="random_resized", size=16, flip=0.5)}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 JPEG photos of several sizes."""
    return write(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", photos(26), store="jpeg")


def read(path: Path, *, epoch: int = 0, start: int = 0, **options: Any) -> list[str]:
    """Hashes of the batches of an epoch."""
    loader = load(path, batch_size=options.pop("batch_size", 4), spec=SPEC, **options)
    loader.set_epoch(epoch, start)
    found = digest(loader)
    loader.close()
    return found


def test_pixels_do_not_depend_on_the_number_of_threads(jpegs: Path) -> None:
    assert read(jpegs, num_workers=1) == read(jpegs, num_workers=2)


def test_pixels_do_not_depend_on_how_far_is_read_ahead(jpegs: Path) -> None:
    assert read(jpegs, batches_ahead=1) == read(jpegs, batches_ahead=5)


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 6}])
def test_another_epoch_or_seed_gives_other_pixels(jpegs: Path, other: dict[str, int]) -> None:
    assert not set(read(jpegs)) & set(read(jpegs, **other))


def test_another_epoch_gives_other_pixels_of_the_same_samples_in_order(jpegs: Path) -> None:
    first, second = (read(jpegs, epoch=e, shuffle=False) for e in (0, 1))

    assert not set(first) & set(second)


def test_evaluation_is_the_same_in_every_epoch(jpegs: Path) -> None:
    assert read(jpegs, train=False) == read(jpegs, train=False, epoch=3, seed=9)


def test_two_processes_give_the_same_pixels(jpegs: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.ffcv.test_resume import read\n"
    code += "print(*read(Path(sys.argv[1])))"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, "-c", code, str(jpegs)],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
    )

    assert done.stdout.split() == read(jpegs), done.stderr


def test_an_epoch_goes_on_at_every_batch_with_the_same_pixels(jpegs: Path) -> None:
    whole = read(jpegs, epoch=2)

    for start in range(len(whole) + 1):
        interrupted = load(jpegs, batch_size=4, spec=SPEC)
        interrupted.set_epoch(2)
        batches = iter(interrupted)
        for _ in range(start):
            next(batches)
        fresh = load(jpegs, batch_size=4, spec=SPEC, seed=99)
        fresh.load_state_dict(interrupted.state_dict())
        assert digest(fresh) == whole[start:], start


def test_going_on_decodes_nothing_of_what_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.beton", photos(12), store="jpeg")
    loader = load(path, batch_size=4, spec=SPEC, shuffle=False)
    expected = digest(loader)[2]
    start = int(read_beton(path).metadata["f0"]["data_ptr"][0])
    with path.open("r+b") as file:  # the first sample cannot be decoded any more
        file.seek(start)
        file.write(b"\0" * 200)

    loader.set_epoch(0, 2)

    assert digest(loader) == [expected]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 4), (4, 2)])
def test_an_epoch_goes_on_with_another_number_of_ranks(
    jpegs: Path, world_size: int, batch_size: int
) -> None:
    options: dict[str, Any] = {"spec": SPEC}
    before = [load(jpegs, batch_size=4, rank=r, world_size=2, **options) for r in range(2)]
    seen: list[int] = []
    for loader in before:
        batches = iter(loader)
        seen += labels(next(batches) for _ in range(2))

    later = [
        load(jpegs, batch_size=batch_size, rank=r, world_size=world_size, **options)
        for r in range(world_size)
    ]
    for loader in later:
        loader.load_state_dict(before[0].state_dict())
    rest = [
        label
        for loader in later
        for batch in loader
        for label in batch[1][: loader.samples(batch)].tolist()
    ]

    assert sorted(seen + rest) == list(range(26))


def test_a_position_between_two_batches_is_refused_when_it_is_used(jpegs: Path) -> None:
    before = load(jpegs, batch_size=4, spec=SPEC)
    next(iter(before))
    later = load(jpegs, batch_size=3, spec=SPEC)

    later.load_state_dict(before.state_dict())

    with pytest.raises(CheckpointError, match="4 samples of the epoch were read"):
        iter(later)
    later.set_epoch(1)
    assert len(labels(later)) == 26


def test_the_state_of_other_data_is_refused(jpegs: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.beton", photos(8))
    state = load(other, batch_size=4, spec=SPEC).state_dict()

    with pytest.raises(CheckpointError, match="resume with the data"):
        load(jpegs, batch_size=4, spec=SPEC).load_state_dict(state)


# ---- the random numbers --------------------------------------------------------------------------


def numbers(draws: int) -> np.ndarray[Any, Any]:
    """Draws of 2000 samples in two epochs, shape (2, 2000, draws)."""
    return np.array(
        [
            [[uniform(np.uint64(key), d) for d in range(draws)] for key in keys]
            for keys in ([sample_key(1, epoch, n) for n in range(2000)] for epoch in (0, 1))
        ]
    )


def test_random_numbers_are_uniform_and_independent() -> None:
    drawn = numbers(3)

    counts = np.histogram(drawn, bins=10, range=(0, 1))[0] / drawn.size
    columns = np.concatenate([drawn[0], drawn[1]], axis=1)  # epochs and draws against each other
    related = np.corrcoef(columns, rowvar=False) - np.eye(6)
    neighbours = np.corrcoef(drawn[0, :-1, 0], drawn[0, 1:, 0])[0, 1]
    # Five standard deviations: 12,000 draws in ten bins, and correlations of 2,000 pairs.
    assert np.abs(counts - 0.1).max() < 5 * (0.09 / 12000) ** 0.5
    assert max(np.abs(related).max(), abs(neighbours)) < 5 / 2000**0.5
    assert 0 <= drawn.min() < drawn.max() < 1

"""The loader without a Trainer, beside a DataLoader in the same loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image as PilImage
from torch.utils.data import DataLoader, TensorDataset

from tests.ffcv.reading import digest, labels, photos, pictures, write
from torchweld.errors import CheckpointError
from torchweld.testing import run_ranks
from torchweld_ffcv import Loader, image
from torchweld_ffcv.errors import ConversionError
from torchweld_ffcv.kinds import Image, Int

CROP = {"image": image(crop="random_resized", size=16, flip=0.5)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 photos of several sizes."""
    return write(tmp_path_factory.mktemp("photos") / "photos.beton", photos(27))


@pytest.mark.parametrize("drop_last", [False, True])
def test_it_gives_what_a_dataloader_gives(tmp_path: Path, drop_last: bool) -> None:
    random = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(13, 5, generator=random), torch.arange(13))
    theirs = DataLoader(data, batch_size=4, drop_last=drop_last)

    ours = Loader(data, batch_size=4, drop_last=drop_last, cache_dir=str(tmp_path))

    assert (len(ours), ours.batch_size, ours.dataset) == (len(theirs), 4, data)
    for mine, expected in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_it_takes_size_and_order_from_a_dataloader(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(13, 5), torch.arange(13))

    loader = Loader(DataLoader(data, batch_size=4, shuffle=True), cache_dir=str(tmp_path))

    assert (loader.batch_size, loader.dataset) == (4, data)
    assert labels(loader) != sorted(labels(loader))


def test_the_random_state_is_afterwards_as_behind_a_dataloader(path: Path) -> None:
    def after(loader: Any) -> torch.Tensor:
        torch.manual_seed(0)
        for _ in loader:
            pass
        return torch.rand(3)

    other = DataLoader(TensorDataset(torch.zeros(27)), shuffle=False)

    assert torch.equal(after(Loader(path, batch_size=4, spec=CROP)), after(other))


def test_every_epoch_has_its_own_order_and_crops_and_can_be_had_again(path: Path) -> None:
    loader = Loader(path, batch_size=4, shuffle=True, seed=1, spec=CROP)
    epochs = [digest(loader) for _ in range(3)]

    loader.set_epoch(1)
    again = digest(loader)

    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert again == epochs[1]
    assert digest(loader) == epochs[2]
    assert digest(Loader(path, batch_size=4, shuffle=True, seed=2, spec=CROP)) != epochs[0]


@pytest.mark.parametrize("count", [0, 3, 7])
def test_it_goes_on_where_another_stopped(path: Path, count: int) -> None:
    def make() -> Loader:
        return Loader(path, batch_size=4, shuffle=True, spec=CROP)

    whole, first, second = make(), make(), make()
    expected = digest(whole) + digest(whole)
    found = digest(batch for _, batch in zip(range(count), first, strict=False))

    second.load_state_dict(first.state_dict())
    found += digest(second)
    found += digest(second) if count < 7 else []

    assert found == expected


def test_a_state_of_other_data_is_refused(path: Path, tmp_path: Path) -> None:
    other = Loader(write(tmp_path / "other.beton", pictures(3)))

    with pytest.raises(CheckpointError, match="resume with the data and options"):
        Loader(path, spec=CROP).load_state_dict(other.state_dict())


def test_evaluation_has_nothing_to_do_with_chance(path: Path) -> None:
    loader = Loader(path, batch_size=4, spec=CROP, train=False)

    assert digest(loader) == digest(loader)
    assert labels(loader) == list(range(27))


def read_share(path: Path) -> list[int]:
    dist.init_process_group("gloo")
    loader = Loader(path, batch_size=4, shuffle=True, spec=CROP)
    return [n for batch in loader for n in batch[1][: loader.samples(batch)].tolist()]


def test_processes_of_a_group_share_an_epoch(path: Path) -> None:
    first, second = run_ranks(read_share, 2, path)

    assert sorted(first + second) == list(range(27))
    assert set(first).isdisjoint(second)


def test_it_leaves_out_what_is_bad_and_stores_as_asked(tmp_path: Path) -> None:
    grey = np.full((8, 8), 7, np.uint8)
    samples = [(PilImage.fromarray(grey), 0), (None, 1), (PilImage.fromarray(grey), 2)]
    fields = {"image": Image(to_rgb=True), "label": Int()}
    options: dict[str, Any] = {"batch_size": 3, "cache_dir": str(tmp_path), "fields": fields}

    with pytest.raises(ConversionError, match="sample 1 of 3"):
        Loader(samples, **options)
    ((images, labels),) = Loader(samples, skip_bad=True, **options)

    assert images.shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 1.5}, {"batch_size": "16"}, {"seed": None}, {"seed": 2**63}], ids=str
)
def test_it_says_which_number_is_none(path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* is not an integer"):
        Loader(path, **wrong)

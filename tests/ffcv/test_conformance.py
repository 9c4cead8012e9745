"""The data source, held to what every stranger's is held to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.ffcv.reading import pictures
from torchweld.testing import DataSourceConformance
from torchweld_ffcv import FFCV, image


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Convert into a folder of this module's; the ranks inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


class TestFfcvSource(DataSourceConformance):
    component = FFCV
    draws_from = ("torch",)  # one number an epoch, as every loop over a DataLoader does
    options: ClassVar = {"batch_size": 4, "num_workers": 2}


class TestFfcvSourceOfImages(DataSourceConformance):
    """With compiled code, chance, and three threads more."""

    component = FFCV
    draws_from = ("torch",)  # one number an epoch, as every loop over a DataLoader does
    options: ClassVar = {
        "batch_size": 4,
        "num_workers": 2,
        "batches_ahead": 3,
        "spec": {"image": image(crop="random_resized", size=8, flip=0.5)},
    }
    world_sizes = (2,)

    def make_data(self, num_samples: int) -> Any:
        return pictures(num_samples)

"""Decoding a part of a JPEG: the same pixels as of the whole, and absent without harm."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.ffcv.reading import digest, load, photo, photos, write
from torchweld_ffcv import cropping, image
from torchweld_ffcv.cropping import decodes_alike, part_decoder
from torchweld_ffcv.imports import libffcv_address
from torchweld_ffcv.resampling import AREA, BILINEAR, find_taps
from torchweld_ffcv.windows import needed

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

SPECS = [
    image(crop="random_resized", size=20, flip=0.5),
    image(crop="random_resized", size=70, interpolation="bilinear"),
    image(crop="center", size=16),
    image(crop="shorter_side", resize=33, size=(20, 30), interpolation="bilinear"),
    image(crop="padded", size=30, padding=2),
]


def jpeg(height: int, width: int, mode: str = "RGB", **options: Any) -> np.ndarray[Any, Any]:
    """The bytes of a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(photo(height, height, width)).convert(mode).save(buffer, "JPEG", **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@needs_compiler
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}],
    ids=str,
)
@pytest.mark.parametrize("size", [(60, 80), (33, 47), (17, 200), (1, 1)], ids=str)
def test_a_part_is_what_the_whole_image_has_there(
    size: tuple[int, int], options: dict[str, Any], mode: str
) -> None:
    source, whole = jpeg(*size, mode, **options), libffcv_address("imdecode")
    part, random = part_decoder(source, *size, whole), np.random.default_rng(0)
    assert part

    for _ in range(30):
        top, left = (int(random.integers(0, length)) for length in size)
        bottom, right = int(random.integers(top, size[0])), int(random.integers(left, size[1]))
        box = (top, bottom + 1, left, right + 1)
        assert decodes_alike(part, whole, source, size, box), box


@needs_compiler
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.crop)
def test_batches_are_the_same_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any
) -> None:
    path = write(tmp_path / "photos.beton", photos(8), store="jpeg")
    parts = digest(load(path, batch_size=4, spec={"image": spec}))

    monkeypatch.setattr(cropping, "_library", lambda: None)

    assert digest(load(path, batch_size=4, spec={"image": spec})) == parts


def test_a_part_holds_all_that_resampling_reads() -> None:
    random = np.random.default_rng(0)

    for _ in range(300):
        length, size = int(random.integers(1, 300)), int(random.integers(1, 60))
        low = int(random.integers(0, length))
        high = int(random.integers(low, length)) + 1
        axis = (float(low), (high - low) / size, low, high)
        begin, end = needed(axis, size, length)
        for method in (AREA, BILINEAR):
            starts, counts, _ = find_taps(axis, size, method)
            assert begin <= starts.min() <= (starts + counts).max() <= end


@needs_compiler
def test_a_file_that_is_cut_short_is_an_error_and_not_grey() -> None:
    source, whole = jpeg(60, 80), libffcv_address("imdecode")
    part = part_decoder(source, 60, 80, whole)

    assert not decodes_alike(part, whole, source[: len(source) // 2], (60, 80), (40, 60, 0, 80))
    assert not decodes_alike(part, whole, source[:100], (60, 80), (0, 60, 0, 80))
    assert not decodes_alike(part, whole, source, (60, 81), (0, 60, 0, 81))


def test_without_a_compiler_whole_images_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    cropping._library.cache_clear()

    found = part_decoder(jpeg(60, 80), 60, 80, libffcv_address("imdecode"))

    cropping._library.cache_clear()
    assert found == 0

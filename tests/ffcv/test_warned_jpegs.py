"""JPEG files that their decoder warns of: kept when written, and read as Pillow and FFCV do."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ffcv.reading import digest, load, photo
from tests.ffcv.writing import read_stock
from torchweld.errors import RunError
from torchweld_ffcv import convert, image

CROP = {"image": image(crop="random_resized", size=16, flip=0.5)}


def jpeg_bytes(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo(seed)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def bytes_too_many(data: bytes) -> bytes:
    """As some cameras write them."""
    return data[:-2] + b"\x01\x02\x03\x04" + data[-2:]


def unchanged(data: bytes) -> bytes:
    return data


def damaged_in_the_middle(data: bytes) -> bytes:
    middle = 2 * len(data) // 3
    return data[:middle] + b"\x55" * 40 + data[middle + 40 :]


@pytest.fixture(scope="module")
def warned_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good JPEG files, and others between them that their decoder warns of."""
    folder = tmp_path_factory.mktemp("warned") / "photos"
    (folder / "all").mkdir(parents=True)
    damaged = damaged_in_the_middle
    changes = [unchanged, bytes_too_many, unchanged, damaged, damaged, unchanged]
    for number, change in enumerate(changes):
        (folder / "all" / f"{number}.jpg").write_bytes(change(jpeg_bytes(number)))
    convert(folder, folder.with_suffix(".beton"))
    return folder.with_suffix(".beton")


def test_a_jpeg_that_its_decoder_warns_of_has_the_pixels_that_ffcv_gives(warned_of: Path) -> None:
    expected = [np.asarray(pixels) for pixels, _ in read_stock(warned_of)]

    loader = load(warned_of, batch_size=6, shuffle=False, spec={"image": image(normalize=None)})
    found = next(iter(loader))[0].permute(0, 2, 3, 1).numpy()

    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(AssertionError):  # control: the fourth is damaged indeed
        np.testing.assert_allclose(found[3].astype(int), photo(3).astype(int), atol=60)


def test_parts_of_a_jpeg_with_warnings_are_those_of_the_whole(
    warned_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = digest(load(warned_of, batch_size=6, spec=CROP))
    monkeypatch.setattr("torchweld_ffcv.columns.part_decoder", lambda *_: 0)

    assert digest(load(warned_of, batch_size=6, spec=CROP)) == parts


def test_a_jpeg_that_cannot_be_decoded_at_all_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "all"
    folder.mkdir(parents=True)
    data = jpeg_bytes(0)
    (folder / "0.jpg").write_bytes(data)
    (folder / "1.jpg").write_bytes(data.replace(b"\xff\xdb", b"\xff\xe1"))  # no quantization
    convert(tmp_path / "photos", tmp_path / "photos.beton")

    with pytest.raises(RunError, match=r"sample 1 of .* cannot be decoded"):
        list(load(tmp_path / "photos.beton", batch_size=2, spec=CROP))

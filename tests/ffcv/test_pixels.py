"""Pixels against those of other libraries: the same, or as near as rounding allows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from torch.torch_version import TorchVersion
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tests.ffcv.reading import load, photo, photos, pictures, write
from tests.ffcv.writing import read_stock, stored
from torchweld_ffcv import IMAGENET, convert, image
from torchweld_ffcv.beton import read_beton
from torchweld_ffcv.install import ffcv_module
from torchweld_ffcv.kinds import Image, Int
from torchweld_ffcv.randomness import sample_key, uniform
from torchweld_ffcv.resampling import AREA
from torchweld_ffcv.windows import RANDOM_RESIZED, Recipe, random_box

# torchvision's weights are 16-bit integers; since torch 2.9 (0.24) it rounds otherwise once more.
ROUNDED_OTHERWISE = 0.03 if TorchVersion(torch.__version__) < "2.8" else 0.25

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six raw photos of several sizes."""
    return write(tmp_path_factory.mktemp("raw") / "raw.beton", photos(6))


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six JPEG photos of one size."""
    samples = [(photo(i), i) for i in range(6)]
    return write(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", samples, store="jpeg")


def read_images(path: Path, *, epoch: int = 0, train: bool = True, **spec: Any) -> list[Array]:
    """All images of a file in order, (height, width, 3)."""
    loader = load(path, batch_size=4, shuffle=False, train=train, spec={"image": image(**spec)})
    loader.set_epoch(epoch)
    return [one.permute(1, 2, 0).numpy() for images, _ in loader for one in images]


def box_of(number: int, size: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """The part that sample ``number`` has in epoch 0 of seed 5, and whether it is flipped."""
    recipe = Recipe(RANDOM_RESIZED, (0.08, 1.0), (3 / 4, 4 / 3), 1.0, 0, 0.5, size, size, AREA)
    key = np.uint64(sample_key(5, 0, number))
    return random_box(recipe, shape[0], shape[1], key), uniform(key, 0) < 0.5


# ---- as they are ---------------------------------------------------------------------------------


def test_raw_pixels_are_those_of_the_dataset(tmp_path: Path) -> None:
    samples = pictures(5)

    found = read_images(write(tmp_path / "raw.beton", samples), normalize=None)

    assert all(np.array_equal(a, b) for a, (b, _) in zip(found, samples, strict=True))


def test_both_layouts_hold_the_same_values(jpegs: Path) -> None:
    last, first = (
        next(iter(load(jpegs, batch_size=6, shuffle=False, channels_last=c))) for c in (True, False)
    )

    assert torch.equal(last[0], first[0])
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    assert first[0].is_contiguous()


def test_normalised_pixels_are_torchvisions_bit_for_bit(tmp_path: Path) -> None:
    samples = pictures(4)
    transform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET.mean, IMAGENET.std)]
    )

    found = read_images(write(tmp_path / "raw.beton", samples), normalize=IMAGENET)

    for ours, (pixels, _) in zip(found, samples, strict=True):
        theirs = transform(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0)
        assert torch.equal(torch.from_numpy(ours), theirs)


def test_jpeg_pixels_are_those_of_ffcvs_decoder(jpegs: Path) -> None:
    stock = [np.asarray(sample[0]) for sample in read_stock(jpegs)]

    found = read_images(jpegs, normalize=None)

    assert all(np.array_equal(a, b) for a, b in zip(found, stock, strict=True))


@pytest.mark.parametrize(("quality", "most"), [(90, 5), (95, 10)])  # the README says so
def test_jpeg_pixels_are_near_those_of_pillow(tmp_path: Path, quality: int, most: int) -> None:
    samples, path = [(photo(i), i) for i in range(12)], tmp_path / "jpegs.beton"
    fields = {"image": Image(store="jpeg", quality=quality), "label": Int()}
    convert(samples, path, fields=fields, workers=1)

    found = read_images(path, normalize=None)

    for index, ours in enumerate(found):
        data = stored(read_beton(path), "image", index)
        difference = np.abs(ours.astype(int) - np.asarray(PilImage.open(io.BytesIO(data))))
        assert difference.mean() < 2
        assert difference.max() <= most


# ---- in another size -----------------------------------------------------------------------------


def test_area_is_opencvs_inter_area_to_one_level(raw: Path) -> None:
    found = read_images(raw, crop="random_resized", size=12, flip=0.5, normalize=None)

    for number, ((pixels, _), ours) in enumerate(zip(photos(6), found, strict=True)):
        (top, left, height, width), flipped = box_of(number, 12, pixels.shape)
        part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        theirs = cv2.resize(part, (12, 12), interpolation=cv2.INTER_AREA)
        theirs = theirs[:, ::-1] if flipped else theirs
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        assert (ours != theirs).mean() < 0.01  # where a mean is half way between two levels


@pytest.mark.parametrize("size", [12, 70])
def test_bilinear_is_torchvisions_antialias_to_one_level(raw: Path, size: int) -> None:
    found = read_images(
        raw, crop="random_resized", size=size, flip=0.5, normalize=None, interpolation="bilinear"
    )

    for number, ((pixels, _), ours) in enumerate(zip(photos(6), found, strict=True)):
        box, flipped = box_of(number, size, pixels.shape)
        picture = torch.from_numpy(pixels).permute(2, 0, 1)
        theirs = functional.resized_crop(picture, *box, [size, size], antialias=True)
        theirs = theirs.flip(-1) if flipped else theirs
        difference = np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy())
        assert difference.max() <= 1
        assert (difference > 0).mean() < ROUNDED_OTHERWISE


def test_center_is_ffcvs_center_crop_to_one_level(raw: Path) -> None:
    found = read_images(raw, crop="center", size=16, part=0.875, normalize=None, train=False)

    for (pixels, _), ours in zip(photos(6), found, strict=True):
        height, width = pixels.shape[:2]
        side = int(0.875 * min(height, width))
        top, left = (height - side) // 2, (width - side) // 2
        part = np.ascontiguousarray(pixels[top : top + side, left : left + side])
        theirs = cv2.resize(part, (16, 16), interpolation=cv2.INTER_AREA)
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_shorter_side_is_torchvisions_resize_and_center_crop_to_one_level(raw: Path) -> None:
    transform = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop((20, 26))])

    found = read_images(
        raw,
        crop="shorter_side",
        resize=32,
        size=(20, 26),
        normalize=None,
        interpolation="bilinear",
    )

    for (pixels, _), ours in zip(photos(6), found, strict=True):
        theirs = transform(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_shorter_side_cuts_the_middle_of_images_that_have_that_size_already(tmp_path: Path) -> None:
    samples = pictures(3, 16, 24)
    path = write(tmp_path / "raw.beton", samples)

    found = read_images(path, crop="shorter_side", resize=16, size=(10, 12), normalize=None)

    for ours, (pixels, _) in zip(found, samples, strict=True):
        assert np.array_equal(ours, pixels[3:13, 6:18])


def test_uint8_and_normalised_images_are_the_same_pixels(raw: Path) -> None:
    options: dict[str, Any] = {"crop": "random_resized", "size": 16, "flip": 0.5}

    whole, floats = (read_images(raw, normalize=n, **options) for n in (None, IMAGENET))

    mean, std = (np.asarray(each, np.float32) for each in (IMAGENET.mean, IMAGENET.std))
    for levels, values in zip(whole, floats, strict=True):
        expected = (levels.astype(np.float32) * np.float32(1 / 255) - mean) / std
        assert np.array_equal(values, expected)


# ---- at random -----------------------------------------------------------------------------------


def test_a_padded_crop_is_a_part_of_the_image_on_black(tmp_path: Path) -> None:
    samples = pictures(8, 10, 10)
    path = write(tmp_path / "raw.beton", samples)

    found = read_images(path, crop="padded", size=10, padding=3, normalize=None)

    places = set()
    for ours, (pixels, _) in zip(found, samples, strict=True):
        padded = np.pad(pixels, ((3, 3), (3, 3), (0, 0)))
        here = [
            (y, x)
            for y in range(7)
            for x in range(7)
            if np.array_equal(padded[y : y + 10, x : x + 10], ours)
        ]
        assert len(here) == 1
        places.add(here[0])
    assert len(places) > 4


def test_flips_come_as_often_as_asked(tmp_path: Path) -> None:
    samples = pictures(400, 2, 3)

    found = read_images(write(tmp_path / "raw.beton", samples), flip=0.25, normalize=None)

    flipped = [np.array_equal(a, b[:, ::-1]) for a, (b, _) in zip(found, samples, strict=True)]
    same = [np.array_equal(a, b) for a, (b, _) in zip(found, samples, strict=True)]
    assert sum(flipped) + sum(same) == 400
    assert 60 < sum(flipped) < 140  # 100 expected, standard deviation 9


def test_random_parts_are_distributed_like_torchvisions() -> None:
    torch.manual_seed(0)
    picture = torch.zeros(3, 200, 300)
    recipe = Recipe(RANDOM_RESIZED, (0.08, 1.0), (3 / 4, 4 / 3), 1.0, 0, 0.0, 9, 9, AREA)
    count = 3000

    ours = [random_box(recipe, 200, 300, np.uint64(sample_key(1, 0, n))) for n in range(count)]
    crop = v2.RandomResizedCrop(9, antialias=True)
    theirs = [_torchvision_box(crop, picture) for _ in range(count)]

    for measure in (_area, _shape, _top, _left):
        a, b = np.array([measure(x) for x in ours]), np.array([measure(x) for x in theirs])
        # Two means of 3000 draws: five standard deviations of their difference.
        assert abs(a.mean() - b.mean()) < 5 * np.hypot(a.std(), b.std()) / count**0.5
        assert a.std() == pytest.approx(b.std(), rel=0.1)


def _torchvision_box(crop: Any, picture: torch.Tensor) -> tuple[int, int, int, int]:
    chosen = crop.make_params([picture]) if hasattr(crop, "make_params") else None
    chosen = crop._get_params([picture]) if chosen is None else chosen
    return chosen["top"], chosen["left"], chosen["height"], chosen["width"]


def _area(box: tuple[int, int, int, int]) -> float:
    return box[2] * box[3]


def _shape(box: tuple[int, int, int, int]) -> float:
    return float(np.log(box[3] / box[2]))


def _top(box: tuple[int, int, int, int]) -> float:
    return box[0]


def _left(box: tuple[int, int, int, int]) -> float:
    return box[1]


# ---- files of others -----------------------------------------------------------------------------


def test_a_file_of_ffcvs_own_writer_is_read(tmp_path: Path) -> None:
    fields, samples = ffcv_module("ffcv.fields"), pictures(6)
    path = tmp_path / "stock.beton"
    writer = ffcv_module("ffcv.writer").DatasetWriter(
        str(path), {"image": fields.RGBImageField(), "label": fields.IntField()}, num_workers=1
    )
    writer.from_indexed_dataset(samples)

    found = read_images(path, normalize=None)

    assert all(np.array_equal(a, b) for a, (b, _) in zip(found, samples, strict=True))

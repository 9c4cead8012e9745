"""The declarative spec: what it refuses, and what becomes of it for a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ffcv.reading import load, pictures, write
from torchweld.errors import InvalidArgument
from torchweld_ffcv import UNIT, Normalize, float32, float64, image, int64, skip
from torchweld_ffcv.beton import Beton, read_beton
from torchweld_ffcv.fitting import fit_spec
from torchweld_ffcv.spec import AsStored, ImageSpec

NAN = float("nan")


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """Pictures with labels."""
    return read_beton(write(tmp_path_factory.mktemp("spec") / "small.beton", pictures(5)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: image(crop="middle", size=8), "crop='middle' is none of 'none'"),  # type: ignore[arg-type]  # on purpose
        (lambda: image(crop="center"), "crop='center' needs the size"),
        (lambda: image(size=0), "size=(0, 0) is no height and width"),
        (lambda: image(flip=1.5), "flip=1.5 is no probability"),
        (lambda: image(crop="random_resized", size=8, scale=(0.5, 0.1)), "scale=(0.5, 0.1)"),
        (lambda: image(crop="random_resized", size=8, scale=(0, 1)), "0 < smallest"),
        (lambda: image(crop="random_resized", size=8, ratio=(2, 1)), "ratio=(2, 1)"),
        (lambda: image(crop="center", size=8, part=0), "part=0"),
        (lambda: image(crop="padded", size=8, padding=-1), "padding=-1"),
        (lambda: image(crop="shorter_side", size=8, resize=7), "resize=7 leaves images smaller"),
        (lambda: image(layout="NHWC"), "layout='NHWC' is neither"),  # type: ignore[arg-type]  # on purpose
        (lambda: image(interpolation="cubic"), "interpolation='cubic' is neither"),  # type: ignore[arg-type]  # on purpose
        (lambda: Normalize((0.5,) * 3, (0.0, 1.0, 1.0)), "has to be finite and > 0"),
        (lambda: Normalize((0.5,) * 3, (NAN, 1.0, 1.0)), "has to be finite and > 0"),
        (lambda: Normalize((NAN,) * 3, (1.0,) * 3), "mean=(nan, nan, nan) has to be finite"),
        (lambda: Normalize((124.0,) * 3, (58.0,) * 3), "divide them by 255"),
        (lambda: Normalize((0.5,), (0.5,)), "needs three channels"),  # type: ignore[arg-type]  # on purpose
    ],
)
def test_what_cannot_be_is_refused_with_its_value(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_fields_without_a_spec_are_read_as_stored(beton: Beton) -> None:
    fitted = fit_spec(beton, {}, train=True, channels_last=False)

    assert fitted == {"image": ImageSpec(normalize=UNIT, layout="contiguous"), "label": int64()}


def test_chance_belongs_to_training(beton: Beton) -> None:
    chosen = {"image": image(crop="random_resized", size=8, flip=0.5)}

    fitted = fit_spec(beton, chosen, train=False, channels_last=True)

    assert fitted["image"] == image(crop="center", part=0.875, size=8, layout="channels_last")


def test_padding_is_left_out_of_evaluation() -> None:
    assert image(crop="padded", size=8, padding=2, flip=0.5).for_evaluation() == image(size=8)


def test_a_chosen_layout_wins_over_what_the_model_wants(beton: Beton) -> None:
    chosen = {"image": image(layout="contiguous")}

    fitted = fit_spec(beton, chosen, train=True, channels_last=True)

    assert fitted["image"] == image(layout="contiguous")


@pytest.mark.parametrize("spec", [int64(), AsStored(), 224])
def test_an_image_is_read_as_an_image_only(beton: Beton, spec: object) -> None:
    with pytest.raises(InvalidArgument, match=r"field 'image' .* holds image"):
        fit_spec(beton, {"image": spec}, train=True, channels_last=False)


def test_leaving_out_every_field_is_refused(beton: Beton) -> None:
    with pytest.raises(InvalidArgument, match="leaves out every field"):
        fit_spec(beton, {"image": skip(), "label": skip()}, train=True, channels_last=False)


def test_a_skipped_field_is_not_in_the_batch(beton: Beton) -> None:
    loader = load(beton.path, batch_size=5, spec={"image": skip()}, shuffle=False)

    (labels,) = next(iter(loader))

    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_numbers_take_the_type_that_was_chosen(tmp_path: Path) -> None:
    samples = [(0.5 * i, i) for i in range(3)]
    spec = {"0": float32(), "1": float64()}

    loader = load(samples, batch_size=3, shuffle=False, cache_dir=str(tmp_path), spec=None)
    names = [field.name for field in loader.contract.fields]
    chosen = dict(zip(names, spec.values(), strict=True))
    typed = load(samples, batch_size=3, shuffle=False, cache_dir=str(tmp_path), spec=chosen)

    assert [str(v.dtype) for v in next(iter(loader))] == ["torch.float64", "torch.int64"]
    assert [str(v.dtype) for v in next(iter(typed))] == ["torch.float32", "torch.float64"]


def test_one_spec_in_two_loaders_gives_equal_batches(beton: Beton) -> None:
    spec = {"image": image(crop="random_resized", size=8, flip=0.5)}

    first, second = (next(iter(load(beton.path, batch_size=5, spec=spec))) for _ in range(2))

    assert all((a == b).all() for a, b in zip(first, second, strict=True))

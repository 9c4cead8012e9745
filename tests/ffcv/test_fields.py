from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ffcv.writing import frames, leftovers, pairs, picture, read_stock, stored
from torchweld.errors import InvalidArgument
from torchweld_ffcv import convert
from torchweld_ffcv.beton import read_beton
from torchweld_ffcv.errors import ConversionError, ValueRefused
from torchweld_ffcv.jpeg import JpegFrame, jpeg_frame
from torchweld_ffcv.kinds import Array, Bytes, Classes, Float, Int, Json, Kind
from torchweld_ffcv.kinds import Image as ImageKind
from torchweld_ffcv.samples import infer_kind
from torchweld_ffcv.values import ImageFile

RGB = np.zeros((6, 8, 3), np.uint8)


def jpeg_of(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def without_scan(data: bytes) -> bytes:
    return data[: data.index(b"\xff\xda")] + b"\xff\xd9"


def with_empty_scan(data: bytes) -> bytes:
    header = data.index(b"\xff\xda") + 2
    return data[: header + int.from_bytes(data[header : header + 2], "big")] + b"\xff\xd9"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, Int()),
        (True, Int()),
        (np.int32(3), Int()),
        (torch.tensor(3), Int()),
        (0.5, Float()),
        (np.float32(0.5), Float("float32")),
        (torch.tensor(0.5), Float("float32")),
        (Image.fromarray(RGB), ImageKind()),
        (RGB, ImageKind(store="raw")),
        (torch.zeros(3, 6, 8, dtype=torch.uint8), ImageKind(store="raw")),
        (np.zeros((6, 8), np.uint8), Array("uint8", (6, 8))),
        (torch.zeros(3, 6, 8), Array("float32", (3, 6, 8))),
        (b"bytes", Bytes()),
        ({"boxes": [1, 2]}, Json()),
        ([1, [2, "x"]], Json()),
    ],
)
def test_kind_is_found_from_a_value(value: Any, kind: Any) -> None:
    assert infer_kind(value) == kind


@pytest.mark.parametrize("value", [None, "cat", object(), {"a": object()}])
def test_kind_of_other_values_is_refused(value: Any) -> None:
    with pytest.raises(ValueRefused):
        infer_kind(value)


@pytest.mark.parametrize(
    ("data", "frame"),
    [
        (jpeg_of(Image.fromarray(RGB)), JpegFrame(8, 6, 3)),
        (jpeg_of(Image.fromarray(RGB), progressive=True), JpegFrame(8, 6, 3)),
        (jpeg_of(Image.fromarray(RGB).convert("L")), JpegFrame(8, 6, 1)),
        (jpeg_of(Image.fromarray(RGB).convert("CMYK")), JpegFrame(8, 6, 4)),
        (jpeg_of(Image.fromarray(RGB), exif=b"Exif\0\0" + bytes(3000)), JpegFrame(8, 6, 3)),
        (jpeg_of(Image.fromarray(RGB)) + b"behind the end", JpegFrame(8, 6, 3)),
        (without_scan(jpeg_of(Image.fromarray(RGB))), JpegFrame(8, 6, 3, has_scan=False)),
        (with_empty_scan(jpeg_of(Image.fromarray(RGB))), JpegFrame(8, 6, 3, has_scan=False)),
        (jpeg_of(Image.fromarray(RGB))[:-20], None),
        (b"\xff\xd8\xff", None),
        (b"\x89PNG", None),
        (b"", None),
    ],
    ids=[
        "rgb",
        "progressive",
        "grey",
        "cmyk",
        "exif",
        "tail",
        "no scan",
        "empty scan",
        "cut",
        "start",
        "png",
        "empty",
    ],
)
def test_jpeg_frame_reads_the_header_alone(data: bytes, frame: JpegFrame | None) -> None:
    assert jpeg_frame(data) == frame


@pytest.mark.parametrize("store", ["auto", "raw"])
@pytest.mark.parametrize("damage", [without_scan, with_empty_scan])
def test_a_jpeg_without_a_scan_is_found_when_converted(
    tmp_path: Path, damage: Callable[[bytes], bytes], store: Any
) -> None:
    """Pillow gives a grey picture for an empty scan, which would be trained on."""
    good = jpeg_of(Image.fromarray(RGB))
    files = [ImageFile(f"{n}.jpg", damage(good) if n == 30 else good) for n in range(40)]
    target = tmp_path / "out.beton"

    with pytest.raises(ConversionError) as caught:
        convert(files, target, workers=2, fields={"image": ImageKind(store=store, to_rgb=True)})

    assert "sample 30 of 40 could not be written" in str(caught.value)
    assert "its field 'image' is '30.jpg', a JPEG file without a scan" in str(caught.value)
    assert "restore it, or leave it out with skip_bad=True" in str(caught.value)
    assert not list(tmp_path.iterdir())


NUMBERED = pairs(40)


def with_value(position: int, value: Any) -> list[Any]:
    """Good samples, and at index 30 one with another value."""
    changed: list[Any] = list(NUMBERED)
    sample = list(changed[30])
    sample[position] = value
    changed[30] = tuple(sample)
    return changed


@pytest.mark.parametrize(
    ("position", "value", "says"),
    [
        (1, None, "its field 'label' is None, not a whole number"),
        (1, "cat", "its field 'label' is 'cat' (str), not a whole number; map it to an int"),
        (1, 0.7, "its field 'label' is 0.7 (float), not a whole number"),
        (1, 2**63, "does not fit 64 bits"),
        (1, np.eye(10)[3], "an array of float64 with shape (10,), not a whole number"),
        (0, None, "its field 'image' is None, neither a picture nor an array"),
        (0, np.zeros((6, 8), np.uint8), "with shape (6, 8), and this field's pictures"),
        (0, np.zeros((6, 8, 4), np.uint8), "Image(to_rgb=True)"),
        (0, np.zeros((3, 6, 8), np.uint8), "pictures have the shape (height, width, 3)"),
        (0, np.zeros((6, 8, 3), np.float32), "pictures hold uint8"),
        (0, Image.new("L", (8, 6)), "a PIL image of mode 'L', 8x6"),
        (0, Image.new("RGBA", (8, 6)), "a PIL image of mode 'RGBA', 8x6"),
        (0, np.zeros((0, 8, 3), np.uint8), "is 8x0 pixels"),
    ],
)
def test_bad_value_is_named_with_sample_field_and_remedy(
    tmp_path: Path, position: int, value: Any, says: str
) -> None:
    with pytest.raises(ConversionError) as caught:
        convert(with_value(position, value), tmp_path / "out.beton", workers=2)

    assert "sample 30 of 40 could not be written" in str(caught.value)
    assert says in str(caught.value)
    assert caught.value.sample == 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ((RGB, "cat"), "sample 0 cannot be stored: its value 1 holds text ('cat' (str))"),
        ((RGB, None), "sample 0 cannot be stored: its value 1 is None"),
        ((np.zeros((2, 2), np.float16), 1), "an array of float16, which FFCV cannot read back"),
        ((np.zeros((2, 0)), 1), "has the shape (2, 0)"),
        ((torch.zeros(2, dtype=torch.bfloat16), 1), "which numpy cannot hold"),
        ({1: RGB}, "has the key 1, which is no text"),
        ((), "has no values"),
    ],
)
def test_first_sample_without_a_kind_is_refused_before_any_work(
    tmp_path: Path, sample: Any, says: str
) -> None:
    with pytest.raises(ConversionError) as caught:
        convert([sample] * 5, tmp_path / "out.beton")

    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_sample_of_another_shape_is_refused(tmp_path: Path) -> None:
    samples: list[Any] = [*NUMBERED, (RGB,)]

    with pytest.raises(ConversionError, match="a tuple of length 1, and the first samples had 2"):
        convert(samples, tmp_path / "out.beton")


def test_ragged_arrays_are_refused_with_a_remedy(tmp_path: Path) -> None:
    samples = [np.zeros(index + 1, np.float32) for index in range(30)]

    with pytest.raises(ConversionError, match=r"shape \(2,\).*pad it to one shape"):
        convert(samples, tmp_path / "out.beton", workers=1)


def test_bytes_of_any_length_are_kept(tmp_path: Path) -> None:
    samples = [bytes([index]) * (index + 1) for index in range(30)]

    convert(samples, tmp_path / "out.beton")

    beton = read_beton(tmp_path / "out.beton")
    assert [stored(beton, "input", index) for index in range(30)] == samples


def test_flat_uint8_arrays_of_different_lengths_become_bytes(tmp_path: Path) -> None:
    samples = [np.full(index + 1, index, np.uint8) for index in range(30)]

    convert(samples, tmp_path / "out.beton")

    beton = read_beton(tmp_path / "out.beton")
    assert beton.fields[0].kind == "bytes"
    assert stored(beton, "input", 29) == bytes([29]) * 30


def test_empty_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"sample 1 .* is empty"):
        convert([b"x", b""], tmp_path / "out.beton")


def test_json_is_what_stock_ffcv_unpacks(tmp_path: Path) -> None:
    from torchweld_ffcv.install import ffcv_module

    samples = [({"name": "Zoë", "boxes": [[1, 2.5]]}, 1), ({"name": None}, 2)]

    convert(samples, tmp_path / "out.beton")

    unpack = ffcv_module("ffcv.fields").JSONField.unpack
    read = read_stock(tmp_path / "out.beton")
    assert [unpack(row[0].numpy()) for row in read] == [sample[0] for sample in samples]


def test_classes_are_stored_by_position(tmp_path: Path) -> None:
    samples = [(RGB, "dog"), (RGB, "cat"), (RGB, "dog")]
    fields: dict[str, Kind] = {"image": ImageKind(), "animal": Classes(("cat", "dog"))}

    convert(samples, tmp_path / "out.beton", fields=fields)

    beton = read_beton(tmp_path / "out.beton")
    assert beton.metadata["f1"].tolist() == [1, 0, 1]
    assert beton.field("animal").classes == ("cat", "dog")


def test_name_outside_the_classes_is_refused(tmp_path: Path) -> None:
    fields: dict[str, Kind] = {"image": ImageKind(), "animal": Classes(("cat", "dog"))}

    with pytest.raises(ConversionError, match=r"'bird' .str., none of the classes 'cat', 'dog'"):
        convert([(RGB, "bird")], tmp_path / "out.beton", fields=fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image": ImageKind()}, "names 1 fields (image), and sample 0 has 2 values"),
        ({"image": ImageKind(), "label": "int"}, "field 'label' has the kind 'int' (str)"),
    ],
)
def test_fields_that_do_not_fit_are_refused(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConversionError) as caught:
        convert(NUMBERED, tmp_path / "out.beton", fields=fields)

    assert says in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageKind(store="png"),  # type: ignore[arg-type]  # what is tested
        lambda: ImageKind(quality=0),
        lambda: ImageKind(max_side=0),
        lambda: Classes(("a", "a")),
        lambda: Classes(()),
    ],
)
def test_kinds_refuse_options_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match=r"=|class names"):
        make()


def test_long_and_foreign_names_are_kept(tmp_path: Path) -> None:
    sample = {"a_very_long_name_of_one": 1, "a_very_long_name_of_two": 2, "größe": 3.5, "ok": 4}

    convert([sample] * 3, tmp_path / "out.beton")

    beton = read_beton(tmp_path / "out.beton")
    assert [field.name for field in beton.fields] == list(sample)
    short = [field.stored_name for field in beton.fields]
    assert len(set(short)) == 4
    assert all(len(name) <= 16 and name.isascii() for name in short)
    assert [float(value) for value in read_stock(tmp_path / "out.beton")[0]] == [1, 2, 3.5, 4]


def test_mapping_samples_may_be_stored_in_part(tmp_path: Path) -> None:
    samples = [{"image": picture(index), "label": index, "note": None} for index in range(20)]

    convert(samples, tmp_path / "out.beton", fields={"label": Int()})

    beton = read_beton(tmp_path / "out.beton")
    assert (beton.container, [field.name for field in beton.fields]) == ("mapping", ["label"])


def test_tensors_with_channels_first_are_stored_as_pictures(tmp_path: Path) -> None:
    samples = [torch.from_numpy(picture(index)).permute(2, 0, 1) for index in range(20)]

    convert(samples, tmp_path / "out.beton")

    beton = read_beton(tmp_path / "out.beton")
    assert (beton.fields[0].kind, beton.fields[0].axes) == ("image", "chw")
    assert stored(beton, "image", 19) == picture(19).tobytes()


def test_grey_and_alpha_become_three_channels_when_asked(tmp_path: Path) -> None:
    grey, alpha = Image.new("L", (8, 6), 7), Image.new("RGBA", (8, 6), (1, 2, 3, 4))
    arrays = [np.full((6, 8), 7, np.uint8), np.full((6, 8, 1), 7, np.uint8)]

    fields = {"image": ImageKind(to_rgb=True)}
    convert([grey, alpha, *arrays], tmp_path / "out.beton", fields=fields)

    beton = read_beton(tmp_path / "out.beton")
    sevens = bytes([7]) * (6 * 8 * 3)
    assert [stored(beton, "image", index) for index in (0, 2, 3)] == [sevens] * 3
    assert stored(beton, "image", 1) == bytes([1, 2, 3]) * 48


def test_pictures_can_be_encoded_and_shrunk_as_ffcv_does(tmp_path: Path) -> None:
    from torchweld_ffcv.install import ffcv_module

    module = ffcv_module("ffcv.fields.rgb_image")
    fields = {"image": ImageKind(store="jpeg", quality=80, max_side=20)}
    large = np.asarray(Image.fromarray(picture(0)).resize((40, 30)))

    convert([large], tmp_path / "out.beton", fields=fields)

    beton = read_beton(tmp_path / "out.beton")
    assert stored(beton, "image", 0) == module.encode_jpeg(module.resizer(large, 20), 80).tobytes()
    assert frames(beton) == [(0, 20, 15)]


def test_numbers_of_both_kinds_become_floats(tmp_path: Path) -> None:
    convert([(RGB, 1), (RGB, 0.5)], tmp_path / "out.beton")

    assert read_beton(tmp_path / "out.beton").metadata["f1"].tolist() == [1.0, 0.5]
    assert leftovers(tmp_path) == []


def test_field_objects_of_ffcv_are_taken(tmp_path: Path) -> None:
    from torchweld_ffcv.install import ffcv_module

    theirs = ffcv_module("ffcv.fields")
    fields = {
        "image": theirs.RGBImageField(write_mode="jpg", max_resolution=5, jpeg_quality=70),
        "label": theirs.IntField(),
        "score": theirs.FloatField(),
        "box": theirs.NDArrayField(np.dtype("float32"), (4,)),
        "mask": theirs.TorchTensorField(torch.int64, (2,)),
        "text": theirs.JSONField(),
        "blob": theirs.BytesField(),
    }
    box, mask = np.ones(4, np.float32), torch.ones(2, dtype=torch.int64)

    convert([(RGB, 1, 0.5, box, mask, {"a": 1}, b"x")], tmp_path / "out.beton", fields=fields)

    beton = read_beton(tmp_path / "out.beton")
    kinds = [field.kind for field in beton.fields]
    assert kinds == ["image", "int", "float", "array", "array", "json", "bytes"]
    assert frames(beton) == [(0, 5, 3)]
    assert len(read_stock(tmp_path / "out.beton")) == 1


@pytest.mark.parametrize("mode", ["smart", "proportion"])
def test_write_mode_of_ffcv_that_decides_by_chance_is_refused(tmp_path: Path, mode: str) -> None:
    from torchweld_ffcv.install import ffcv_module

    field = ffcv_module("ffcv.fields").RGBImageField(write_mode=mode)

    with pytest.raises(InvalidArgument, match=rf"write_mode='{mode}'.*store='auto'"):
        convert([RGB], tmp_path / "out.beton", fields={"image": field})

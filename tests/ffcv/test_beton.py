from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ffcv.writing import pairs, photo_folder
from torchweld_ffcv import convert, layout
from torchweld_ffcv.beton import read_beton, verify
from torchweld_ffcv.errors import BetonError
from torchweld_ffcv.install import ffcv_module


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.beton"
    convert(pairs(200), path, workers=2)
    return path.read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "data.beton"


def header_of(data: bytes) -> np.ndarray[Any, Any]:
    head: np.ndarray[Any, Any] = np.frombuffer(data[:24], layout.HEADER).copy()
    return head


def test_layout_is_that_of_ffcv() -> None:
    types = ffcv_module("ffcv.types")
    fields = ffcv_module("ffcv.fields")

    assert types.HeaderType == layout.HEADER
    assert types.FieldDescType == layout.DESCRIPTOR
    assert types.ALLOC_TABLE_TYPE == layout.ALLOCATION
    assert types.CURRENT_VERSION == layout.VERSION
    made = [fields.RGBImageField(), fields.IntField(), fields.BytesField(), fields.FloatField()]
    ours = [layout.METADATA[number] for number in (2, 1, 3, 0)]
    assert layout.metadata_dtype(ours) == types.get_metadata_type(made)


def test_array_arguments_are_those_of_ffcv() -> None:
    field = ffcv_module("ffcv.fields").NDArrayField(np.dtype("<f4"), (3, 5))

    ours = layout.array_arguments(np.dtype("<f4"), (3, 5))

    assert field.to_binary().tobytes().rstrip(b"\0") == ours.rstrip(b"\0")
    assert layout.parse_array_arguments(ours) == (np.dtype("<f4"), (3, 5))


def test_beton_knows_samples_fields_and_manifest(good: bytes, place: Path) -> None:
    place.write_bytes(good)

    beton = read_beton(place)
    verify(beton)

    assert beton.num_samples == 200
    assert [(field.name, field.kind) for field in beton.fields] == [
        ("image", "image"),
        ("label", "int"),
    ]
    assert beton.metadata["f1"].tolist() == list(range(200))
    assert beton.container == "tuple"


def test_beton_reads_a_file_of_ffcvs_own_writer(tmp_path: Path) -> None:
    script = """
import sys
from torchweld_ffcv.install import ffcv_module
DatasetWriter = ffcv_module("ffcv.writer").DatasetWriter
from ffcv.fields import RGBImageField, IntField
from tests.ffcv.writing import pairs
fields = {"picture": RGBImageField(), "number": IntField()}
writer = DatasetWriter(sys.argv[1], fields, num_workers=1)
writer.from_indexed_dataset(pairs(150))
"""
    path = tmp_path / "stock.beton"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True)

    beton = read_beton(path)

    assert [field.name for field in beton.fields] == ["picture", "number"]
    assert (beton.num_samples, beton.manifest) == (150, None)
    with pytest.raises(BetonError, match="has no checksums"):
        verify(beton)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"short", "has 5 bytes, a header has 24"),
        (
            b"name,label\ncat.jpg,0\ndog.jpg,1\n" * 4,
            "is no .beton file: it begins with b'name,lab'",
        ),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100), "is no .beton file"),
        (bytes(4096), "is no .beton file"),
    ],
    ids=["empty", "short", "text", "jpeg", "zeros"],
)
def test_beton_says_what_is_none(place: Path, data: bytes, says: str) -> None:
    place.write_bytes(data)

    with pytest.raises(BetonError) as caught:
        read_beton(place)

    assert says in str(caught.value)
    assert str(place) in str(caught.value)


def test_beton_says_what_to_do_when_there_is_no_file(place: Path) -> None:
    with pytest.raises(BetonError, match=r"there is no file .*torchweld ffcv convert SOURCE"):
        read_beton(place)


def test_beton_says_how_a_directory_becomes_one(tmp_path: Path) -> None:
    with pytest.raises(BetonError, match=r"is a directory.*torchweld ffcv convert"):
        read_beton(tmp_path)


def test_beton_names_an_unreadable_file(place: Path, tmp_path: Path) -> None:
    place.symlink_to(place)  # readable by nobody, root included

    with pytest.raises(BetonError, match="cannot be read: Too many levels"):
        read_beton(place)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("version", 3, "has version 3 of the .beton format"),
        ("alloc_table_ptr", 0, "was never finished"),
        ("num_samples", 201, "says 201 samples"),
        ("num_samples", 0, "has no samples"),
        ("num_fields", 60000, "ends inside its table"),
        ("num_fields", 1, "has 1 fields and was written with 2"),
        ("page_size", 5 << 20, "is no .beton file"),
        ("alloc_table_ptr", 1 << 40, "its allocation table should be at byte"),
    ],
)
def test_beton_finds_a_changed_header(
    good: bytes, place: Path, column: str, value: int, says: str
) -> None:
    head = header_of(good)
    head[column] = value
    place.write_bytes((head.tobytes() + good[24:])[: 1 << 25])

    with pytest.raises(BetonError, match=says):
        read_beton(place)


def test_beton_finds_every_truncation(good: bytes, place: Path) -> None:
    place.write_bytes(good)
    lengths = random.Random(7).sample(range(len(good)), 300)
    found = 0

    for length in sorted(lengths, reverse=True):
        with place.open("r+b") as file:
            file.truncate(length)
        with pytest.raises(BetonError, match=r"data.beton"):
            read_beton(place)
        found += 1

    assert found == 300


def test_beton_finds_pointers_that_leave_the_file(good: bytes, place: Path) -> None:
    data = bytearray(good)
    start = layout.metadata_offset(2) + 5  # behind mode, width and height of sample 0
    data[start : start + 8] = (1 << 50).to_bytes(8, "little")
    place.write_bytes(data)

    with pytest.raises(BetonError, match="field 'image': a sample lies outside"):
        read_beton(place)


@pytest.mark.parametrize("where", ["header", "metadata", "page", "manifest", "table"])
def test_verify_finds_one_changed_byte_anywhere(good: bytes, place: Path, where: str) -> None:
    table = int(header_of(good)["alloc_table_ptr"][0])
    offset = {
        "header": 6,  # of the page size, whose other bytes still make one
        "metadata": layout.metadata_offset(2) + 1,
        "page": layout.PAGE_BYTES + 1000,
        "manifest": table - 100,
        "table": len(good) - 3,
    }[where]
    data = bytearray(good)
    data[offset] = data[offset] ^ 0x80 if where != "header" else 0
    data[7] = data[7] if where != "header" else 1  # 16 MiB
    place.write_bytes(data)

    with pytest.raises(BetonError, match="is damaged"):
        verify(read_beton(place))


def test_control_stock_ffcv_reads_an_unfinished_file_as_black_pictures(
    good: bytes, place: Path
) -> None:
    head = header_of(good)
    head["alloc_table_ptr"] = 0
    metadata = layout.metadata_offset(2)
    rows = 200 * layout.metadata_dtype([layout.IMAGE_METADATA, np.dtype("<i8")]).itemsize
    data = head.tobytes() + good[24:metadata] + bytes(rows) + good[metadata + rows : 1 << 20]
    place.write_bytes(data[: len(data) // 24 * 24])
    script = """
import sys
from ffcv.loader import Loader
from ffcv.pipeline.compiler import Compiler
Compiler.set_enabled(False)
loader = Loader(sys.argv[1], batch_size=50, num_workers=1)
print(sum(len(labels) for _, labels in loader), {tuple(images.shape) for images, _ in loader})
"""

    done = subprocess.run(
        [sys.executable, "-c", script, str(place)], check=True, capture_output=True, text=True
    )

    assert done.stdout.split(" ", 1) == ["200", "{(50, 0, 0, 3)}\n"]
    with pytest.raises(BetonError, match="was never finished"):
        read_beton(place)


def test_field_names_those_that_exist(good: bytes, place: Path) -> None:
    place.write_bytes(good)

    with pytest.raises(BetonError, match="no field 'labels'; its fields are 'image', 'label'"):
        read_beton(place).field("labels")


def test_a_folder_is_read_without_torch(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 4)
    script = """
import sys
from torchweld_ffcv import convert
from torchweld_ffcv.beton import read_beton
convert(sys.argv[1], sys.argv[2])
print(read_beton(sys.argv[2]).num_samples, sorted({"torch", "numba", "ffcv"} & set(sys.modules)))
"""
    words = [sys.executable, "-c", script, str(folder), str(tmp_path / "out.beton")]

    done = subprocess.run(words, check=True, capture_output=True, text=True)

    assert done.stdout == "4 []\n"


def test_beton_refuses_a_pipe_instead_of_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(BetonError, match="is no regular file"):
        read_beton(tmp_path / "pipe")

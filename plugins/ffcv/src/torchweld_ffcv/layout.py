"""How a ``.beton`` file is laid out, as FFCV 1.0.2 reads it, and where the manifest lies.

    header | field descriptors | metadata, one row a sample | pages | manifest | allocation table

FFCV finds everything through the header and the table at the end; nothing points to the manifest,
so stock FFCV reads over it. Source: ``ffcv/types.py`` and ``ffcv/fields`` of ffcv 1.0.2.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

VERSION = 2
MIN_PAGE_BYTES = 1 << 21  # a huge page of memory; smaller ones are refused by FFCV
PAGE_BYTES = 1 << 23  # FFCV's default
MAX_PAGE_BYTES = 1 << 31  # the largest power of two in the header's 32 bits

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
DESCRIPTOR = np.dtype(
    [("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", (1024,))], align=True
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
SEGMENT = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc", "<u4")])
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])

IMAGE_METADATA = np.dtype(
    [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]
)
BYTES_METADATA = np.dtype([("ptr", "<u8"), ("size", "<u8")])
JPEG_MODE, RAW_MODE = 0, 1
NAME_BYTES = 16

FLOAT, INT, IMAGE, BYTES, ARRAY, JSON, TENSOR, CUSTOM = 0, 1, 2, 3, 4, 5, 6, 255
KINDS = {
    FLOAT: "float",
    INT: "int",
    IMAGE: "image",
    BYTES: "bytes",
    ARRAY: "array",
    JSON: "json",
    TENSOR: "array",
    CUSTOM: "custom",
}
"""FFCV's number of a field type to the word used here."""

METADATA = {
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    IMAGE: IMAGE_METADATA,
    BYTES: BYTES_METADATA,
    ARRAY: np.dtype("<u8"),
    JSON: BYTES_METADATA,
    TENSOR: np.dtype("<u8"),
}
POINTER = {IMAGE: "data_ptr", BYTES: "ptr", ARRAY: "", JSON: "ptr", TENSOR: ""}
"""Where a field's metadata has its pointer; ``""``: it is the pointer."""

_MAGIC = b"TWBETON1"
_FOOTER = struct.Struct("<8sQQII")  # magic, JSON bytes, segments, crc of both, of the footer so far


@dataclass(frozen=True)
class Manifest:
    """What this plugin writes into a file beside FFCV's own tables.

    Attributes:
        data: fingerprint, kinds of the fields, versions; plain JSON.
        segments: dtype ``SEGMENT``: every region of the file with the crc32 of its bytes.
    """

    data: Mapping[str, Any]
    segments: np.ndarray[Any, Any]


def metadata_dtype(parts: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
    """The type of one row of metadata, with columns ``f0``, ``f1``, … padded as FFCV does."""
    return np.dtype([("", part) for part in parts], align=True)


def metadata_offset(num_fields: int) -> int:
    """Where the metadata begins, in bytes."""
    return HEADER.itemsize + num_fields * DESCRIPTOR.itemsize


def align(offset: int, size: int) -> int:
    """The first multiple of ``size`` that is not below ``offset``."""
    return -(-offset // size) * size


def array_arguments(dtype: np.dtype[Any], shape: Sequence[int]) -> bytes:
    """The descriptor's arguments of an array field."""
    described = json.dumps(dtype.descr).encode("ascii")
    head = np.zeros(1, dtype=ARRAY_ARGUMENTS)
    head["shape"][0, : len(shape)] = shape
    head["type_length"] = len(described)
    return head.tobytes() + described


def parse_array_arguments(arguments: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Element type and shape of an array field.

    Raises:
        ValueError: the arguments are not those of an array.
    """
    head = np.frombuffer(arguments, ARRAY_ARGUMENTS, count=1)[0]
    start = ARRAY_ARGUMENTS.itemsize
    described = json.loads(arguments[start : start + int(head["type_length"])])
    dtype = np.dtype([tuple(part) for part in described])["f0"]
    shape = tuple(int(length) for length in head["shape"])
    while shape and shape[-1] == 0:
        shape = shape[:-1]
    return dtype, shape


def descriptors(fields: Sequence[tuple[int, str, bytes]]) -> bytes:
    """The field table from ``(type number, stored name, arguments)``."""
    table = np.zeros(len(fields), dtype=DESCRIPTOR)
    for row, (type_id, name, arguments) in zip(table, fields, strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        row["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
    return table.tobytes()


def header(*, num_fields: int, page_bytes: int, num_samples: int, table_offset: int) -> bytes:
    """The 24 bytes at the beginning."""
    values = (VERSION, num_fields, page_bytes, num_samples, table_offset)
    return np.array([values], dtype=HEADER).tobytes()


def pack_manifest(manifest: Manifest) -> bytes:
    """The manifest as it lies right before the allocation table."""
    text = json.dumps(manifest.data, ensure_ascii=False).encode()
    body = text + manifest.segments.astype(SEGMENT).tobytes()
    fields = (_MAGIC, len(text), len(manifest.segments), zlib.crc32(body))
    head = struct.pack("<8sQQI", *fields)
    return body + _FOOTER.pack(*fields, zlib.crc32(head))


def manifest_bytes(tail: bytes) -> int | None:
    """Size of the whole manifest that ends with ``tail``, or None where there is none."""
    if len(tail) < _FOOTER.size:
        return None
    footer = tail[-_FOOTER.size :]
    magic, text_bytes, num_segments, _, crc = _FOOTER.unpack(footer)
    if magic != _MAGIC or zlib.crc32(footer[:-4]) != crc:
        return None
    return int(text_bytes) + int(num_segments) * SEGMENT.itemsize + _FOOTER.size


def unpack_manifest(blob: bytes) -> Manifest:
    """Read what :func:`pack_manifest` made.

    Raises:
        ValueError: a byte of it has changed.
    """
    _, text_bytes, num_segments, crc, _ = _FOOTER.unpack(blob[-_FOOTER.size :])
    body = blob[: -_FOOTER.size]
    if zlib.crc32(body) != crc:
        raise ValueError("its checksum is wrong")
    segments = np.frombuffer(body[text_bytes:], SEGMENT, count=num_segments)
    return Manifest(json.loads(body[:text_bytes]), segments)


FOOTER_BYTES = _FOOTER.size
"""How many bytes :func:`manifest_bytes` needs."""

"""Files that are on the disk when a function returns, and their checksums.

Tensors are written by a few lines here instead of ``safetensors.torch.save_file``: one tensor
after the other is copied to the CPU, so a save needs memory for the largest piece, not for all;
the checksum is made on the way, so nothing is read again; and a full disk is an ``OSError``.
``safetensors`` itself reads the files (and a test reads them through ``load_file``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchweld.errors import CheckpointError

SAFE_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes that every version of safetensors reads; others are stored as bytes."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Stamp:
    """What a file must still be: its size and its sha256."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Read the file and return its stamp."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        return cls(path.stat().st_size, digest.hexdigest())

    def to_json(self) -> dict[str, Any]:
        """Return the form that an index holds."""
        return {"bytes": self.size, "sha256": self.sha256}

    def damage(self, path: Path, *, contents: bool) -> str:
        """Say what happened to the file; empty when nothing.

        Args:
            path: the file.
            contents: also read it and compare the checksum.
        """
        if not path.is_file():
            return "missing"
        size = path.stat().st_size
        if size < self.size:
            return f"truncated to {size} of {self.size} bytes"
        if size > self.size:
            return f"{size} bytes instead of {self.size}"
        if contents and Stamp.of(path).sha256 != self.sha256:
            return "changed since it was written (another sha256)"
        return ""


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; ``load`` is called when its turn comes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    load: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.itemsize


def write_tensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> Stamp:
    """Write a safetensors file, one tensor in memory at a time, and fsync it.

    Raises:
        OSError: the disk is full, or not writable.
        CheckpointError: two entries have one key.
    """
    # Larger items first keeps every tensor aligned in the memory map, as safetensors does.
    ordered = sorted(entries, key=lambda entry: (-entry.itemsize, entry.key))
    header = _header(ordered, metadata)
    with path.open("xb") as file:
        writer = _HashingWriter(file)
        writer.write(len(header).to_bytes(8, "little"))
        writer.write(header)
        for entry in ordered:
            writer.write(tensor_bytes(entry.load()))
        _sync(file)
    return Stamp(writer.size, writer.digest.hexdigest())


def write_json(path: Path, value: object) -> Stamp:
    """Write strict JSON and fsync it.

    Raises:
        OSError: the disk is full, or not writable.
    """
    text = json_bytes(value)
    with path.open("xb") as file:
        file.write(text)
        _sync(file)
    return Stamp(len(text), hashlib.sha256(text).hexdigest())


def json_bytes(value: object) -> bytes:
    """Return the one way in which this package writes a value as JSON."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the elements in row-major order, on the CPU."""
    flat = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(torch.uint8).numpy().data


def make_directory(path: Path) -> None:
    """Make a directory and its parents, each on the disk before the next."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_keys(keys: Iterable[str]) -> None:
    """Refuse keys that a safetensors file cannot hold.

    Raises:
        CheckpointError: a key comes twice, is empty, or is the one of the metadata.
    """
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise CheckpointError(f"two tensors are called {key!r}")
        if not key or key == "__metadata__":
            raise CheckpointError(f"a tensor cannot be called {key!r}")
        seen.add(key)


class _HashingWriter:
    """Writes to a file, counts and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``."""
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    check_keys(entry.key for entry in entries)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for entry in entries:
        end = begin + entry.size
        header[entry.key] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

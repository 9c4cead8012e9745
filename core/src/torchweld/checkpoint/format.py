"""What lies in a checkpoint directory, and whether it is all still there.

::

    step-90/
      manifest.json        written last: versions, step, stamps of the indexes, the caller's header
      00000.json           index of rank 0: its pieces, the stamp of its tensors, its own state
      00000.safetensors    the pieces, each flattened
      00001.json  00001.safetensors  ...

The manifest vouches for the indexes (size and sha256), each index for its tensors, and the
manifest for itself. File names follow from the rank: no path in a file is ever followed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchweld.checkpoint.files import Stamp, json_bytes
from torchweld.checkpoint.pieces import Piece
from torchweld.errors import CheckpointDamaged, CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Stored:
    """One piece in a safetensors file.

    Attributes:
        name: of the tensor, e.g. ``"model/0.weight"``.
        key: in the file; the name unless one rank wrote several pieces of it.
        dtype: of the tensor, without ``torch.``; rare ones are stored as bytes.
        piece: where it lies.
    """

    name: str
    key: str
    dtype: str
    piece: Piece

    def to_json(self) -> dict[str, Any]:
        """Return the form that an index holds."""
        piece = self.piece
        return {
            "name": self.name,
            "key": self.key,
            "dtype": self.dtype,
            "global_shape": list(piece.global_shape),
            "start": piece.start if isinstance(piece.start, int) else list(piece.start),
            "local_shape": list(piece.local_shape),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stored:
        """Read what :meth:`to_json` wrote; KeyError, TypeError or ValueError if it is not that."""
        start = data["start"]
        piece = Piece(
            _shape(data["global_shape"]),
            int(start) if isinstance(start, int) else _shape(start),
            _shape(data["local_shape"]),
        )
        return cls(str(data["name"]), str(data["key"]), str(data["dtype"]), piece)


@dataclass(frozen=True)
class Index:
    """What one rank wrote."""

    rank: int
    tensors: Stamp
    stored: tuple[Stored, ...]
    state: Any = None

    def to_json(self) -> dict[str, Any]:
        """Return the contents of the index file."""
        return {
            "format": FORMAT,
            "rank": self.rank,
            "tensors": self.tensors.to_json(),
            "pieces": [stored.to_json() for stored in self.stored],
            "state": self.state,
        }


def index_path(directory: Path, rank: int) -> Path:
    """Return the path of a rank's index."""
    return directory / f"{rank:05d}.json"


def tensors_path(directory: Path, rank: int) -> Path:
    """Return the path of a rank's tensors."""
    return directory / f"{rank:05d}.safetensors"


def is_checkpoint(directory: Path) -> bool:
    """Say whether a directory is a checkpoint, complete or not."""
    first = (directory / MANIFEST, index_path(directory, 0), tensors_path(directory, 0))
    return any(path.is_file() for path in first)


def read_index(directory: Path, rank: int) -> Index:
    """Read the index of one rank.

    Raises:
        CheckpointDamaged: it is missing, or not what torchweld writes.
    """
    path = index_path(directory, rank)
    data = _read_json(path)
    try:
        stored = tuple(Stored.from_json(piece) for piece in data["pieces"])
        return Index(int(data["rank"]), _stamp(data["tensors"]), stored, data["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(
            f"{path} is not an index that torchweld wrote: {error!r}"
        ) from error


def seal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Add the manifest's own checksum."""
    return {**manifest, "sha256": hashlib.sha256(json_bytes(manifest)).hexdigest()}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest.

    Raises:
        CheckpointDamaged: it is missing (the checkpoint is incomplete), or changed.
        CheckpointError: there is no such directory, or it has a newer format.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint at {directory}: there is no such directory")
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointDamaged(
            f"{directory} is no complete checkpoint: {MANIFEST}, which is written last, is missing"
        )
    manifest = _read_json(path)
    seal = manifest.pop("sha256", None)
    if manifest.get("format", 0) != FORMAT and seal == seal_manifest(manifest)["sha256"]:
        raise CheckpointError(
            f"{directory} has format {manifest.get('format')!r}, this torchweld reads {FORMAT}; "
            f"it was written by torchweld {manifest.get('torchweld')}"
        )
    if seal != seal_manifest(manifest)["sha256"]:
        raise CheckpointDamaged(f"{path}: changed since it was written (another sha256)")
    return manifest


def index_stamps(manifest: Mapping[str, Any]) -> list[Stamp]:
    """Return the stamps of the indexes, by rank."""
    try:
        return [_stamp(stamp) for stamp in manifest["ranks"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(f"{MANIFEST} has no list of ranks: {error!r}") from error


def find_damage(directory: Path, *, contents: bool = True) -> list[str]:
    """List the damaged files of a checkpoint, e.g. ``"00001.safetensors: missing"``.

    Args:
        directory: of the checkpoint.
        contents: read every file and compare checksums; False compares sizes of the tensors only
            (the manifest and the indexes are small and always compared).
    """
    try:
        manifest = read_manifest(directory)
        stamps = index_stamps(manifest)
    except CheckpointError as error:
        return [str(error)]
    return [
        problem
        for rank, stamp in enumerate(stamps)
        for problem in _rank_damage(directory, rank, stamp, contents=contents)
    ]


def _rank_damage(directory: Path, rank: int, stamp: Stamp, *, contents: bool) -> list[str]:
    index, tensors = index_path(directory, rank), tensors_path(directory, rank)
    damage = stamp.damage(index, contents=True)
    if damage:
        return [f"{index.name}: {damage}"]
    try:
        written = read_index(directory, rank).tensors
    except CheckpointDamaged as error:
        return [str(error)]
    damage = written.damage(tensors, contents=contents)
    return [f"{tensors.name}: {damage}"] if damage else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path}: missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path}: changed since it was written ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointDamaged(f"{path}: changed since it was written (no JSON object)")
    return data


def _stamp(data: Mapping[str, Any]) -> Stamp:
    return Stamp(int(data["bytes"]), str(data["sha256"]))


def _shape(data: Any) -> tuple[int, ...]:
    shape = tuple(int(size) for size in data)
    if any(size < 0 for size in shape):
        raise ValueError(f"negative size in {shape}")
    return shape

"""Find checkpoints under ``default_root_dir/<run>/<checkpoint>``, and remove old ones.

Reads only; one process asks and tells the others.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchweld.checkpoint.files import sync_directory
from torchweld.checkpoint.format import find_damage, is_checkpoint, read_manifest
from torchweld.checkpoint.writer import old_path, partial_path
from torchweld.errors import CheckpointError, InvalidArgument


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was not taken, and why: ``"00001.safetensors: missing"``."""

    path: Path
    reason: str


def complete(root: str | Path) -> list[Path]:
    """Return the complete checkpoints under ``root``, newest first.

    Args:
        root: a ``default_root_dir``, or the directory of one run.
    """
    return [path for path, manifest in _candidates(Path(root)) if manifest]


def checkpoints(root: str | Path) -> list[Path]:
    """Return all checkpoints under ``root``, incomplete and damaged ones too, newest first."""
    return [path for path, _ in _candidates(Path(root))]


def last(root: str | Path, model_digest: str | None = None) -> tuple[Path | None, list[Skipped]]:
    """Find the newest checkpoint that is complete, intact and of this model.

    Every file of the one returned was read and compared: open it with ``verify=False``.

    Args:
        root: a ``default_root_dir``, or the directory of one run.
        model_digest: must equal ``header["model_digest"]``; None takes any model.

    Returns:
        Its path, or None; and the newer ones that were skipped, with reasons.
    """
    return _first_intact(checkpoints(root), model_digest)


def best(
    root: str | Path,
    monitor: str,
    mode: Literal["min", "max"],
    model_digest: str | None = None,
) -> tuple[Path | None, list[Skipped]]:
    """Find the intact checkpoint with the best ``header["metrics"][monitor]``; see :func:`last`.

    Of equal ones the newest is taken; one without the metric, or with nan, is not considered.

    Raises:
        InvalidArgument: ``mode`` is neither ``"min"`` nor ``"max"``.
    """
    if mode not in ("min", "max"):
        raise InvalidArgument(f"mode must be 'min' or 'max', got {mode!r}")
    sign = 1.0 if mode == "min" else -1.0
    scored = [
        (sign * score, path)
        for path, manifest in _candidates(Path(root))
        if (score := _score(manifest, monitor)) is not None
    ]
    scored.sort(key=_by_score)  # stable: newest first among equals
    return _first_intact([path for _, path in scored], model_digest)


def headers(paths: Iterable[Path]) -> list[tuple[Path, Mapping[str, Any]]]:
    """Return those of ``paths`` that are complete checkpoints, each with its header."""
    found = []
    for path in paths:
        with suppress(CheckpointError):
            found.append((path, read_manifest(path)["header"]))
    return found


def remove(path: Path) -> None:
    """Remove a checkpoint: at no moment is it there by name and not whole.

    Raises:
        CheckpointError: ``path`` is no checkpoint.
    """
    if not is_checkpoint(path):
        raise CheckpointError(f"{path} is no checkpoint: it was not removed")
    part = partial_path(path)
    shutil.rmtree(part, ignore_errors=True)
    # What a killed replacement left would be taken for the checkpoint once its name is free.
    shutil.rmtree(old_path(path), ignore_errors=True)
    path.rename(part)
    try:
        sync_directory(path.parent)
        shutil.rmtree(part)
    except BaseException:  # Ctrl-C: what has lost its name would stay for ever
        shutil.rmtree(part, ignore_errors=True)
        raise


def prune(paths: Sequence[Path], keep: int) -> list[Path]:
    """Remove all but the first ``keep`` of ``paths``, which come in the order of their worth.

    Returns:
        The removed paths.

    Raises:
        InvalidArgument: ``keep`` is negative.
    """
    if keep < 0:
        raise InvalidArgument(f"keep must be 0 or more, got {keep}")
    surplus = list(paths[keep:])
    for path in surplus:
        remove(path)
    return surplus


def _first_intact(
    paths: Sequence[Path], model_digest: str | None
) -> tuple[Path | None, list[Skipped]]:
    skipped: list[Skipped] = []
    for path in paths:
        reason = _why_not(path, model_digest)
        if not reason:
            return path, skipped
        skipped.append(Skipped(path, reason))
    return None, skipped


def _why_not(path: Path, model_digest: str | None) -> str:
    try:
        found = read_manifest(path)["header"].get("model_digest")
    except CheckpointError as error:
        return str(error)
    if model_digest is not None and found != model_digest:
        return f"it is of another model (digest {found}, this model has {model_digest})"
    return "; ".join(find_damage(path))


def _candidates(root: Path) -> list[tuple[Path, Mapping[str, Any] | None]]:
    """Return all checkpoints, newest first; None for a manifest that is missing or damaged."""
    found = []
    for path in _directories(root):
        try:
            manifest: Mapping[str, Any] | None = read_manifest(path)
        except CheckpointError:
            manifest = None
        found.append((path, manifest))
    return sorted(found, key=_age, reverse=True)


def _directories(root: Path) -> Iterator[Path]:
    for child in _children(root):
        if is_checkpoint(child):
            yield child
            continue
        yield from filter(is_checkpoint, _children(child))


def _children(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and _is_named(path))


def _is_named(path: Path) -> bool:
    if path.name.startswith(".") and path.name.endswith(".old"):
        # A replacement that was interrupted between its two renames.
        return not path.with_name(path.name[1 : -len(".old")]).exists()
    return not path.name.startswith(".")


def _age(candidate: tuple[Path, Mapping[str, Any] | None]) -> tuple[float, int, str]:
    path, manifest = candidate
    if manifest is None:
        return path.stat().st_mtime, 0, path.name
    return float(manifest["time"]), int(manifest["step"]), path.name


def _score(manifest: Mapping[str, Any] | None, monitor: str) -> float | None:
    value = value_here(monitor, manifest["header"].get("metrics", {})) if manifest else None
    if not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)


def of_epoch(name: str) -> str:
    """The name of a metric's mean over an epoch."""
    return f"{name}/epoch"


def value_here(monitor: str, metrics: Mapping[str, Any]) -> Any:
    """What a metric that is followed counts as; at the end of an epoch its mean over the epoch.

    One of validation (``val_…``) is always of a whole data set. None where there is none.
    """
    here = metrics.get(monitor)
    return here if monitor.startswith("val_") else metrics.get(of_epoch(monitor), here)


def _by_score(scored: tuple[float, Path]) -> float:
    return scored[0]

"""What ``torchweld inspect`` shows of a checkpoint, a run, or a directory of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchweld.checkpoint.find import checkpoints
from torchweld.checkpoint.format import (
    MANIFEST,
    Stored,
    find_damage,
    is_checkpoint,
    read_index,
    read_manifest,
)
from torchweld.checkpoint.state import decode_with, dtype_from
from torchweld.errors import CheckpointError
from torchweld.resolving.memory import size_text

_KINDS = {"model": "model", "optim": "optimizer"}


def inspect(path: str | Path) -> dict[str, Any]:
    """Return what is known of a checkpoint, also of an incomplete or damaged one.

    Returns:
        For a checkpoint: ``kind`` ``"checkpoint"``, ``path``, ``complete``, ``damage`` (a list,
        empty when every file is intact), and as far as they can be read ``step``, ``epoch``,
        ``samples``, ``created``, ``torchweld``, ``torch``, ``world_size``, ``plan``,
        ``components``, ``makers``, ``metrics``, ``groups``, ``tensors``.
        For a run or a directory of runs: ``kind`` ``"run"``, ``path``, ``checkpoints``.

    Raises:
        CheckpointError: there is neither at ``path``.
    """
    directory = Path(path)
    if is_checkpoint(directory):
        return _inspect_checkpoint(directory)
    found = checkpoints(directory)
    if not found:
        raise CheckpointError(
            f"no checkpoint at {directory}: it is "
            + ("a directory without one" if directory.is_dir() else "not a directory")
        )
    return {
        "kind": "run",
        "path": str(directory),
        "checkpoints": [_inspect_checkpoint(one) for one in found],
    }


def describe(report: Mapping[str, Any]) -> str:
    """Return what :func:`inspect` found as the text that ``torchweld inspect`` prints."""
    if report["kind"] == "run":
        return "\n".join(_line(one) for one in report["checkpoints"])
    return "\n".join(f"{label:<12}{text}" for label, text in _rows(report) if text)


def _inspect_checkpoint(directory: Path) -> dict[str, Any]:
    report: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(directory),
        "complete": (directory / MANIFEST).is_file(),
        "damage": find_damage(directory),
    }
    try:
        manifest = read_manifest(directory)
    except CheckpointError:
        return report
    header = manifest["header"]
    keys = ("step", "epoch", "samples", "created", "torchweld", "torch", "world_size")
    report.update({key: manifest[key] for key in keys})
    report.update({key: header.get(key) for key in ("model_digest", "metrics", "makers")})
    report.update(_plan(header), groups=_groups(header))
    if not any(_is_of_index(problem) for problem in report["damage"]):
        report["tensors"] = _tensors(directory, range(len(manifest["ranks"])))
    return report


def _is_of_index(problem: str) -> bool:
    return problem.partition(":")[0].endswith(".json")


def _plan(header: Mapping[str, Any]) -> dict[str, Any]:
    plan = header.get("plan")
    if isinstance(plan, str):
        plan = json.loads(plan)
    if not isinstance(plan, Mapping):
        return {"plan": None, "components": []}
    components = [_component(part) for part in plan.get("order", ())]
    return {"plan": plan.get("digest"), "components": components}


def _component(part: object) -> str:
    if isinstance(part, Mapping):
        return f"{part.get('phase', '')} {part.get('name', '')}".strip()
    return str(part)


def _groups(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each group's hyper-parameters, with the number of its parameters for their names."""
    groups = decode_with(header.get("groups", []), _no_tensor)
    summaries = []
    for group in groups:
        names = group.get("names", group.get("params", ()))
        numbers = {k: v for k, v in group.items() if k not in ("names", "params")}
        summaries.append({"parameters": len(names), **numbers})
    return summaries


def _no_tensor(_key: str) -> Tensor:
    return torch.empty(0, device="meta")  # such as a learning rate kept in a tensor: not read


def _tensors(directory: Path, ranks: Iterable[int]) -> dict[str, dict[str, int]]:
    totals = {kind: {"count": 0, "bytes": 0} for kind in ("model", "optimizer", "other")}
    seen: set[str] = set()
    for rank in ranks:
        for stored in read_index(directory, rank).stored:
            total = totals[_KINDS.get(stored.name.partition("/")[0], "other")]
            total["count"] += stored.name not in seen
            total["bytes"] += _bytes(stored)
            seen.add(stored.name)
    return totals


def _bytes(stored: Stored) -> int:
    return math.prod(stored.piece.local_shape) * dtype_from(stored.dtype).itemsize


def _line(report: Mapping[str, Any]) -> str:
    parts = [report["path"]]
    if "step" in report:
        parts += [f"step {report['step']}", report["created"], _pairs(report["metrics"] or {})]
    parts.append("damaged: " + "; ".join(report["damage"]) if report["damage"] else "intact")
    return "   ".join(part for part in parts if part)


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("checkpoint", report["path"])]
    if "step" in report:
        rows += _header_rows(report)
    for number, group in enumerate(report.get("groups", ())):
        hyper = {key: value for key, value in group.items() if key != "parameters"}
        rows.append((f"group {number}", f"{group['parameters']} parameters   {_pairs(hyper)}"))
    for kind, total in report.get("tensors", {}).items():
        rows.append((kind, f"{total['count']} tensors   {size_text(total['bytes'])}"))
    damage: Sequence[str] = report["damage"]
    rows += [("damaged", problem) for problem in damage] or [("files", "all intact")]
    return rows


def _header_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    processes = "process" if report["world_size"] == 1 else "processes"
    return [
        ("step", f"{report['step']}   epoch {report['epoch']}   {report['samples']} samples"),
        ("written", f"{report['created']}   by {report['world_size']} {processes}"),
        ("versions", f"torchweld {report['torchweld']}   torch {report['torch']}"),
        ("plan", (report["plan"] or "")[:6]),
        ("components", ", ".join(report["components"])),
        ("made with", _pairs(report["makers"] or {})),
        ("metrics", _pairs(report["metrics"] or {})),
    ]


def _pairs(values: Mapping[str, Any]) -> str:
    return "   ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )

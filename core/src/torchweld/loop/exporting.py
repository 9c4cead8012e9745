"""Weights alone, consolidated out of what every rank holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchweld.checkpoint import Checkpoint, export_shards, export_weights, write
from torchweld.errors import CheckpointError

if TYPE_CHECKING:
    from torchweld.loop.wiring import Wiring


def export_run(wiring: Wiring, path: str | Path, *, in_use: bool = False) -> Path:
    """Write the consolidated weights as one safetensors file; every rank must call it.

    The file's header names the surgeries that renamed or replaced parameters: ``apply_surgery``
    with them makes the model that loads it.

    Args:
        wiring: of the run.
        path: of the file.
        in_use: what is in the model now, such as an average, and not what is stepped.

    Raises:
        CheckpointError: it could not be written; on all ranks.
    """
    with wiring.ranks.first_cause({"doing": "export"}):
        return _export_together(wiring, Path(path), in_use)


def export_models(wiring: Wiring, path: str | Path, *, in_use: bool = False) -> Path:
    """Write ``path/<name>.safetensors`` for each of several models; every rank must call it.

    Raises:
        CheckpointError: it could not be written; on all ranks.
    """
    directory, ranks = Path(path), wiring.ranks
    with ranks.first_cause({"doing": "export"}):
        make = partial(directory.mkdir, parents=True, exist_ok=True)
        problem = "" if ranks.rank else _try_export(make)
        failed = ranks.exchange("exported", problem)[0]
        if failed:
            raise CheckpointError(
                f"several models are exported into a directory, and {directory} cannot be made: "
                f"{failed}"
            )
        for name, member in wiring.members.items():
            one = replace(wiring, prepared=member.prepared)
            _export_together(one, directory / f"{name}.safetensors", in_use)
    return directory


def _export_together(wiring: Wiring, target: Path, in_use: bool) -> Path:
    ranks, prepared = wiring.ranks, wiring.prepared
    metadata = {
        "format": "pt",
        "torchweld_surgeries": json.dumps([c.name for c in wiring.plan.surgeries]),
        "torchweld_plan": wiring.plan.digest,
    }
    read = (prepared.working_copies if in_use else None) or prepared.shards
    shards = list(read())
    everything_on_rank_0 = all(
        text == "0" for text in ranks.exchange("export", str(len(shards)))[1:]
    )
    if everything_on_rank_0:
        problem = (
            _try_export(lambda: export_shards(shards, target, metadata)) if not ranks.rank else ""
        )
    else:
        part = target.with_name(f".{target.name}.shards")
        write(
            part,
            rank=ranks.rank,
            world_size=ranks.world_size,
            exchange=ranks.exchange,
            shards=(shard for shard in shards if shard.name.startswith("model/")),
            header={},
        )
        problem = (
            _try_export(lambda: _consolidate(part, target, metadata)) if not ranks.rank else ""
        )
    failed = ranks.exchange("exported", problem)[0]
    if failed:
        raise CheckpointError(f"the weights could not be written to {target}: {failed}")
    return target


def _try_export(export: Any) -> str:
    try:
        export()
    except (OSError, CheckpointError) as error:
        return str(error)
    return ""


def _consolidate(part: Path, target: Path, metadata: Mapping[str, str]) -> None:
    export_weights(Checkpoint.open(part), target, metadata)
    shutil.rmtree(part)

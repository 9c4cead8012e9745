"""A run's state as a checkpoint, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchweld import rng
from torchweld.checkpoint import (
    Checkpoint,
    best,
    decode,
    encode,
    last,
    rank_name,
    snapshot,
    write,
)
from torchweld.checkpoint.position import Reading, batch_here
from torchweld.errors import CheckpointError, InvalidArgument
from torchweld.loop.keeping import kept_names
from torchweld.spelling import did_you_mean

if TYPE_CHECKING:
    from torchweld.loop.run import TrainingRun
    from torchweld.loop.wiring import Wiring


# ---- out ---------------------------------------------------------------------------------------


def save_run(run: TrainingRun) -> Path:
    """Write ``<run directory>/step-<n>``; every rank must call it.

    Raises:
        CheckpointError: nothing may be written in this run, or writing failed (also of the one
            that was still being written beside the training); on all ranks.
    """
    run.borders.saver.wait()
    path = write(**_contents(run))
    _note_safe(run, path)
    return path


def async_save_run(run: TrainingRun) -> Future[Path]:
    """Copy the state, and write ``<run directory>/step-<n>`` beside the next steps.

    Every rank must call it. It waits for the one before.

    Raises:
        CheckpointError: nothing may be written in this run, what is to be saved cannot be, or the
            one before could not be written; on all ranks.
    """
    saver = run.borders.saver
    saver.wait()
    draft = snapshot(**_contents(run))
    return saver.start(draft, run.wiring.ranks.beside("save"), partial(_note_safe, run))


def _contents(run: TrainingRun) -> dict[str, Any]:
    """The arguments of ``write``."""
    wiring, position = run.wiring, run.position
    if wiring.directory is None:
        raise CheckpointError(
            "this run writes nothing (enable_checkpointing=False or barebones=True): leave that "
            "out to save a checkpoint"
        )
    state, tensors = _rank_state(run)
    rank = wiring.ranks.rank
    return {
        "path": wiring.directory / f"step-{position.step}",
        "rank": rank,
        "world_size": wiring.ranks.world_size,
        "exchange": wiring.ranks.exchange,
        "shards": wiring.prepared.shards(),
        "tensors": {rank_name(rank, key): value for key, value in tensors.items()},
        "header": _header(run),
        "state": state,
    }


def _note_safe(run: TrainingRun, path: Path) -> None:
    """Remember what to say should the run fail from here on."""
    run.where["note"] = f"last complete checkpoint: {path} (intact); resume with ckpt_path='last'"


def _header(run: TrainingRun) -> dict[str, Any]:
    wiring, position = run.wiring, run.position
    loader = wiring.feed.loader
    return {
        "step": position.step,
        "epoch": position.epoch,
        "samples": position.samples,
        "plan": json.loads(run.plan.to_json()),
        "plan_digest": wiring.plan.digest,
        "model_digest": wiring.model_digest,
        "metrics": encode(run.borders.measured(), "the metrics")[0],
        "epoch_sums": encode(dict(wiring.recorder.epoch_sums), "the losses")[0],
        "kept": kept_names(run),
        "groups": _groups(wiring),
        "makers": _makers(wiring),
        "hparams": encode(dict(wiring.hparams), "hparams")[0],
        "surgeries": [chosen.name for chosen in wiring.plan.surgeries],
        "data": {
            "batch": position.batch,
            "batch_size": loader.batch_size,
            "world_size": wiring.ranks.world_size,
            "accumulate": wiring.table.accumulate,
            "batches_per_epoch": wiring.table.batches_per_epoch,
        },
    }


def _makers(wiring: Wiring) -> dict[str, str]:
    """Whose state is saved; that of another class would be taken without a word."""
    makers = {"optimizer": wiring.optimizer_class}
    if wiring.scheduler is not None:
        makers["lr_scheduler"] = type(wiring.scheduler).__name__
    return makers


def _groups(wiring: Wiring) -> list[dict[str, Any]]:
    """Parameter groups by name, with the hyper-parameters that are plain values."""
    optimizer = wiring.prepared.optimizer
    assert optimizer is not None
    plain = (int, float, bool, str, type(None))
    return [
        {"names": names, **{k: v for k, v in group.items() if isinstance(v, plain)}}
        for names, group in zip(wiring.group_names, optimizer.param_groups, strict=True)
    ]


def _rank_state(run: TrainingRun) -> tuple[Any, Mapping[str, Any]]:
    wiring = run.wiring
    optimizer = wiring.prepared.optimizer
    assert optimizer is not None
    scheduler = wiring.scheduler
    hypers = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = {
        "rng": rng.capture(),
        "loader": dict(wiring.feed.state()),
        "hyper_parameters": hypers,
        "schedule": None if scheduler is None else scheduler.state_dict(),
        "components": {name: part.state_dict() for name, part in wiring.stateful.items()},
    }
    return encode(state, "state")


def check_savable(wiring: Wiring) -> None:
    """Refuse before step 1 what could not be saved later.

    Raises:
        CheckpointError: names the component whose state is more than plain values and tensors.
    """
    for name, part in wiring.stateful.items():
        encode(part.state_dict(), f"component {name!r}")
    encode(dict(wiring.hparams), "hparams")
    if wiring.scheduler is not None:
        encode(wiring.scheduler.state_dict(), "the scheduler")


# ---- in ----------------------------------------------------------------------------------------


def find_checkpoint(
    wiring: Wiring, ckpt_path: str | Path, monitored: tuple[str, str] | None
) -> Checkpoint:
    """Open the checkpoint that ``ckpt_path`` means; rank 0 looks, so that all take the same.

    Args:
        ckpt_path: ``"last"``, ``"best"``, or a path.
        monitored: metric and mode of the run's ModelCheckpoint, for ``"best"``.

    Raises:
        CheckpointError: there is none, or it does not belong to this model.
    """
    ranks = wiring.ranks
    found = ""
    if ranks.rank == 0:
        found = str(_find(wiring, str(ckpt_path), monitored))
    checkpoint = Checkpoint.open(ranks.exchange("resume", found)[0], verify=False)
    _check_model(wiring, checkpoint)
    return checkpoint


def _find(wiring: Wiring, ckpt_path: str, monitored: tuple[str, str] | None) -> Path:
    if ckpt_path not in {"last", "best"}:
        meant = did_you_mean(ckpt_path, ("last", "best"))
        if meant and not Path(ckpt_path).exists():
            raise CheckpointError(f"ckpt_path={ckpt_path!r}: there is no such directory; {meant}")
        return Checkpoint.open(ckpt_path).path
    if ckpt_path == "best":
        if monitored is None:
            raise InvalidArgument(
                "ckpt_path='best' needs to know by what: "
                "callbacks=[ModelCheckpoint(monitor='val_loss')]"
            )
        path, skipped = best(wiring.root, *monitored, wiring.model_digest)  # type: ignore[arg-type]  # the mode was checked
    else:
        path, skipped = last(wiring.root, wiring.model_digest)
    for other in skipped:
        wiring.console.warn(f"skipped {other.path}: {other.reason}")
    if path is None:
        raise CheckpointError(
            f"ckpt_path={ckpt_path!r}: there is no intact checkpoint of this model under "
            f"{wiring.root}{' (see the ones skipped above)' if skipped else ''}"
        )
    return path


def _check_model(wiring: Wiring, checkpoint: Checkpoint) -> None:
    if checkpoint.header["model_digest"] != wiring.model_digest:
        surgeries = checkpoint.header.get("surgeries", [])
        raise CheckpointError(
            f"{checkpoint.path} was made of another model (names, shapes or dtypes differ): its "
            f"surgeries were {surgeries}, this plan's "
            f"{[c.name for c in wiring.plan.surgeries]}; "
            f"see: torchweld inspect {checkpoint.path}"
        )


def restore_run(run: TrainingRun, checkpoint: Checkpoint) -> str:
    """Put a run where ``checkpoint`` was; returns a line that says so.

    Weights, optimizer, schedule, every component's state and the position always; the random
    state only on as many processes as before (it is derived from the seed otherwise, and said).

    Raises:
        CheckpointError: the position inside the epoch cannot be taken up.
    """
    wiring, header = run.wiring, checkpoint.header
    _check_makers(wiring, checkpoint)
    _restore_position(run, header)
    wiring.recorder.epoch_sums = dict(decode(header["epoch_sums"], {}))
    wiring.prepared.restore(checkpoint)
    same_world = header["data"]["world_size"] == wiring.ranks.world_size
    source = wiring.ranks.rank if same_world else 0
    state = decode(checkpoint.rank_state(source), checkpoint.rank_tensors(source))
    _restore_groups(wiring, state["hyper_parameters"])
    if wiring.scheduler is not None:
        wiring.scheduler.load_state_dict(state["schedule"])
    _restore_components(wiring, state["components"])
    _restore_loader(run, state["loader"])
    if same_world:
        rng.restore(state["rng"])
    _note_safe(run, checkpoint.path)
    return _resumed_line(checkpoint, header, same_world, wiring)


def _check_makers(wiring: Wiring, checkpoint: Checkpoint) -> None:
    before, now = checkpoint.header["makers"], _makers(wiring)
    for argument in sorted(before.keys() | now.keys()):
        theirs, mine = before.get(argument, "none"), now.get(argument, "none")
        if theirs != mine:
            raise CheckpointError(
                f"{checkpoint.path} was made with {argument} {theirs}, and this run has {mine}: "
                f"resume with {theirs}, or start from its weights alone with init_weights="
            )


def _restore_components(wiring: Wiring, states: Mapping[str, Any]) -> None:
    for name, part in wiring.stateful.items():
        if name in states:
            part.load_state_dict(states[name])
        else:
            wiring.console.warn(f"the checkpoint has no state of {name!r}: it begins anew")
    for name in sorted(states.keys() - wiring.stateful.keys()):
        wiring.console.warn(f"the checkpoint has a state of {name!r}, which this run does not have")


def _restore_groups(wiring: Wiring, groups: list[dict[str, Any]]) -> None:
    optimizer = wiring.prepared.optimizer
    assert optimizer is not None
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint has {len(groups)} parameter groups and this run has "
            f"{len(optimizer.param_groups)}: resume with the same param_groups="
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)


def _restore_position(run: TrainingRun, header: Mapping[str, Any]) -> None:
    position, table = run.position, run.wiring.table
    position.step, position.epoch = header["step"], header["epoch"]
    position.samples = header["samples"]
    position.batch = batch_here(header["data"], _reading(run.wiring))
    position.steps_in_epoch = position.batch // table.accumulate
    if table.steps_per_epoch is not None:
        here = position.epoch * table.steps_per_epoch + position.steps_in_epoch
        run.rewire(replace(run.wiring, table=replace(table, shift=position.step - here)))


def _restore_loader(run: TrainingRun, state: Mapping[str, Any]) -> None:
    position, feed = run.position, run.wiring.feed
    if position.batch or state.get("order") == feed.loader.state_dict().get("order"):
        feed.loader.load_state_dict(state)
    if position.batch:
        # A new epoch is begun after the random state was restored, as in the run before.
        feed.start(position.epoch, position.batch)


def _reading(wiring: Wiring) -> Reading:
    table = wiring.table
    return Reading(
        wiring.feed.loader.batch_size,
        wiring.ranks.world_size,
        table.accumulate,
        has_length=table.batches_per_epoch is not None,
    )


def _resumed_line(
    checkpoint: Checkpoint, header: Mapping[str, Any], same_world: bool, wiring: Wiring
) -> str:
    line = f"resumed {checkpoint.path} at step {header['step']}, epoch {header['epoch'] + 1}"
    if not same_world:
        line += (
            f"; made by {header['data']['world_size']} processes, now {wiring.ranks.world_size}: "
            "random states are new ones"
        )
    return line
